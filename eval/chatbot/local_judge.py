"""A judge that is a model here: a checkpoint or a run, asked in its chat form."""

from collections.abc import Iterator, Mapping
from typing import Any

from eval.answering import BatchSize, answered
from eval.chatbot.asking import Prompt, Reply
from eval.chatbot.sampled import TURN, own_seed
from eval.examinee import Examinee
from eval.generation import Generate, generation
from eval.request import Request
from models import Sampling, render_chat
from models.llama import causal


class LocalJudge:
    """A loaded model; each prompt's draws come from the seed and the prompt's key."""

    def __init__(
        self,
        name: str,
        examinee: Examinee,
        *,
        temperature: float = 0.2,
        max_tokens: int = 1024,
        seed: int = 0,
        batch_size: BatchSize = "auto",
    ) -> None:
        causal(examinee.model, "judge")
        self.name, self.examinee, self.batch_size = name, examinee, batch_size
        self.settings: dict[str, Any] = {
            "model": name,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "weights": examinee.identity[:16],
            "seed": seed,
        }

    def tokens(self, prompt: Prompt) -> int:
        return len(self.ids(prompt))

    def ids(self, prompt: Prompt) -> list[int]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        return render_chat(self.examinee.tokenizer, messages, add_generation_prompt=True)[0]

    def replies(self, prompts: Mapping[str, Prompt]) -> Iterator[tuple[str, Reply]]:
        """Batch by batch, the longest prompts first."""
        keys: dict[Request, str] = {}
        asked: dict[str, Generate] = {}
        for key, prompt in prompts.items():
            asked[key] = self.request(key, prompt)
            keys[asked[key]] = key
        for fresh in answered(self.examinee, list(keys), self.batch_size):
            for request, text in fresh.items():
                it = asked[keys[request]]
                usage = {"prompt_tokens": len(it.ids), "completion_tokens": len(self.examinee.tokenizer.encode(text))}
                yield keys[request], Reply(text, {"usage": usage, **({"cut": it.cut} if it.cut else {})})

    def request(self, key: str, prompt: Prompt) -> Generate:
        room, seed = self.settings["max_tokens"], own_seed(self.settings["seed"], key)
        sampling = Sampling(temperature=self.settings["temperature"])
        return generation(self.examinee, prompt.user, room, (TURN,), sampling, seed, self.ids(prompt))
