"""A RoBERTa and a T5 of toy size, pretrained here: no trained English ones are at hand, and results say so.

They learn a language that is made up. It has topics with words of their own and words that go with any topic, and a
text is many of its topic's words among others. Pretraining sees texts without labels and foretells words of them,
RoBERTa those behind its mask and T5 the second half from the first, so that it learns which words go together. The task
to fine-tune for is whether a text's topic is one of the first half, from so few labelled texts that many words are in
none of them: what is known of those comes from pretraining, and a model from random weights does worse.
"""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor, nn

import models
from benchmarks.parity.tasks import Rates, Record, Task, write_parts
from models.files import write_whole
from models.roberta import Roberta
from models.roberta_config import RobertaConfig
from models.t5 import T5
from models.t5_config import T5Config
from models.tokenizer import Tokenizer
from train.sweep.cells import taken

TOYS = ("toy-roberta", "toy-t5")
ANSWERS = ("first", "second")
RATES: Rates = {"full": (1e-4, 3e-4, 1e-3, 3e-3), "adapters": (3e-4, 1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a toy is, and how long it is pretrained."""

    width: int = 128
    layers: int = 2
    """Of RoBERTa, and of each half of T5."""
    topics: int = 8
    topic_words: int = 30
    common_words: int = 20
    length: int = 16
    """Words of a text of pretraining."""
    of_topic: float = 0.8
    """Share of them that its topic decides."""
    labelled_length: int = 8
    labelled_of_topic: float = 0.5
    """Likewise of a text with a label: fewer, or there would be nothing to get wrong."""
    pretraining: int = 500
    """Steps of 64 texts."""
    labelled: int = 48
    tune: int = 128
    test: int = 512


class Language:
    """Words and texts; a text is drawn by a generator of its own."""

    def __init__(self, size: Size) -> None:
        self.size = size
        names = [a + b for a in syllables() for b in syllables()]
        Random(0).shuffle(names)
        count = size.topic_words
        self.topics = [names[topic * count : (topic + 1) * count] for topic in range(size.topics)]
        self.common = names[size.topics * count :][: size.common_words]
        self.words = [*(word for topic in self.topics for word in topic), *self.common]

    def text(self, draw: Random, length: int, of_topic: float) -> tuple[str, int]:
        """A text and its topic; its other words are common, or of one other topic."""
        topic = draw.randrange(len(self.topics))
        own, others = self.topics[topic], self.common + draw.choice(self.topics)
        pool = (own if draw.random() < of_topic else others for _ in range(length))
        return " ".join(draw.choice(words) for words in pool), topic

    def labelled(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Texts with which half of the topics theirs is in."""
        draw = Random(seed)
        made = (self.text(draw, self.size.labelled_length, self.size.labelled_of_topic) for _ in range(count))
        return [(text, ANSWERS[topic >= len(self.topics) // 2]) for text, topic in made]


def syllables() -> list[str]:
    return [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def toy_task(name: str, work: Path, size: Size = Size(), limit: int | None = None, steps: int | None = None) -> Task:
    """The toy's task; the toy is pretrained unless the work directory has it."""
    language, place = Language(size), work / name
    sizes = {"train": size.labelled, "tune": size.tune, "test": min(size.test, limit or size.test)}
    texts = {part: language.labelled(count, 1 + seed) for seed, (part, count) in enumerate(sizes.items())}
    labels = name == "toy-roberta"

    def record(text: str, answer: str) -> Record:
        return {"text": text, "label": answer} if labels else {"prompt": text, "completion": f" {answer}"}

    write_parts(place, {part: [record(*it) for it in each] for part, each in texts.items()})
    untrained, trained, note = place / "untrained", place / "pretrained", place / "pretraining.json"
    while not note.exists():
        with taken(place / "pretraining.lock") as mine:
            if mine and not note.exists():
                make(language, labels, untrained, trained, note)
            elif not mine:
                time.sleep(1)
    return Task(
        name=name,
        model=str(trained),
        directory=place,
        measure="accuracy",
        words=() if labels else ANSWERS,
        steps=steps or 60,
        batch_size=32,
        data={"format": "classification" if labels else "prompt-completion"},
        rates=RATES,
        untrained=str(untrained),
        source={"toy": True, "examples": sizes, "pretraining": json.loads(note.read_text())},
    )


def make(language: Language, labels: bool, untrained: Path, trained: Path, note: Path) -> None:
    """Write the toy with fresh weights, pretrain it, write it again, and note how that went."""
    torch.manual_seed(0)
    (write_words if labels else write_pieces)(language, untrained)
    tokenizer = models.load_tokenizer(untrained)
    model = initialized((roberta if labels else t5)(language.size, tokenizer.vocab_size))
    save(model, tokenizer, untrained)
    losses = pretrain(model, tokenizer, language)
    save(model, tokenizer, trained)
    write_whole(note, json.dumps(losses) + "\n")


# Models


def roberta(size: Size, vocab_size: int) -> Roberta:
    sizes = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_hidden_layers": size.layers}
    positions = size.length + 4  # two marks, and two rows that are no token's
    return Roberta(
        RobertaConfig(
            vocab_size=vocab_size,
            num_attention_heads=size.width // 32,
            max_position_embeddings=positions,
            type_vocab_size=1,
            **sizes,
        )
    )


def t5(size: Size, vocab_size: int) -> T5:
    return T5(
        T5Config(
            vocab_size=vocab_size,
            d_model=size.width,
            d_kv=32,
            d_ff=4 * size.width,
            num_layers=size.layers,
            num_decoder_layers=size.layers,
            num_heads=size.width // 32,
        )
    )


def initialized(model: models.Model) -> models.Model:
    """Fresh weights: norms 1, biases 0, all else normal with the deviation that keeps the size of what goes through.

    A T5's are those of its release: its embedding 1, and its queries smaller, since its attention does not scale them.
    """
    keys = model.config.d_kv if isinstance(model, T5) else 1
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, float("norm" in name.lower() and name.endswith("weight")))
        elif isinstance(model, T5) and parameter is model.shared.weight:
            nn.init.normal_(parameter)
        else:
            inputs = parameter.shape[1] * (keys if name.endswith("Attention.q.weight") else 1)
            nn.init.normal_(parameter, std=inputs**-0.5)
    return model


def save(model: models.Model, tokenizer: Tokenizer, directory: Path) -> None:
    models.save(model, directory)
    models.save_tokenizer(tokenizer, directory)


def write_words(language: Language, directory: Path) -> None:
    """fairseq's dictionary, in which a token is a word."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "dict.txt", "".join(f"{word} 1\n" for word in language.words))


def write_pieces(language: Language, directory: Path) -> None:
    """A SentencePiece file with T5's special pieces, in which a piece is a word."""
    from sentencepiece import SentencePieceTrainer

    directory.mkdir(parents=True, exist_ok=True)
    words, made = (*language.words, *ANSWERS), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=made,
        model_type="word",
        vocab_size=len(words),  # and all of them, with the special pieces besides
        use_all_vocab=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    write_whole(directory / "spiece.model", made.getvalue())


# Pretraining


def pretrain(model: models.Model, tokenizer: Tokenizer, language: Language) -> dict[str, float]:
    """Learn to fill in what is missing; the mean losses of the first and last tenth of the steps."""
    size, steps = language.size, language.size.pretraining
    draw, losses = Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        texts = [tokenizer.encode(language.text(draw, size.length, size.of_topic)[0]) for _ in range(64)]
        batch = masked(texts, tokenizer, draw) if isinstance(model, Roberta) else halves(texts, tokenizer)
        loss = model.loss(**batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    tenth = max(1, steps // 10)
    return {"steps": steps, "first_loss": sum(losses[:tenth]) / tenth, "last_loss": sum(losses[-tenth:]) / tenth}


PEAK_RATE = 3e-3
HIDDEN = 0.2  # share of words that are to be filled in


def masked(texts: list[list[int]], tokenizer: Tokenizer, draw: Random) -> dict[str, Int[Tensor, "B T"]]:
    """Texts between RoBERTa's marks with some words behind its mask; those are learned."""
    begin, end, mask = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_tokens["<mask>"]
    ids = torch.tensor([[begin, *text, end] for text in texts])
    hidden = torch.tensor([[False, *(draw.random() < HIDDEN for _ in text), False] for text in texts])
    return {"input_ids": ids.masked_fill(hidden, mask), "labels": ids.masked_fill(~hidden, -100)}


def halves(texts: list[list[int]], tokenizer: Tokenizer) -> dict[str, Int[Tensor, "B T"]]:
    """The first half of each text to be read and the second to be written, as T5 was adapted to language modelling."""
    half, end = len(texts[0]) // 2, tokenizer.eos_token_id
    return {
        "input_ids": torch.tensor([[*text[:half], end] for text in texts]),
        "labels": torch.tensor([[*text[half:], end] for text in texts]),
    }
