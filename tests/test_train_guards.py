"""What watches over a run: steps that are no numbers, layers that learn nothing, steps that stand out, memory."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import models
from models.errors import ConfigError, NonFiniteError
from models.parallel import world
from tests import tiny
from tests.test_train_loop import CONFIG, ROWS, Rows, Toy, a_run, collate, text, train_lines
from train.data.batches import Batch
from train.nonfinite import find
from train.optimizer import OptimizerConfig, make_optimizer
from train.passes import Passes
from train.run import Run
from train.seed import seed_everything, seed_step
from train.spikes import Spikes, longest
from train.step import check_all_moved, dry_step, update


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("guards") / "model")


def llama(checkpoint, **settings):
    model = models.load(checkpoint, dtype=torch.float32)
    seed_everything(0)
    models.attach_lora(model, models.LoraConfig(rank=2, **settings))
    model.gradient_checkpointing = True
    return model.train()


def batch(*wheres, value=5):
    ids = torch.full((len(wheres), 6), value)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}, wheres)


# Seeds of steps


def test_a_micro_batchs_seed_depends_on_its_numbers_and_on_nothing_that_came_before():
    def draw(*numbers):
        torch.rand(7)
        seed_step(*numbers)
        return torch.rand(1).item()

    numbers = [(seed, step, place) for seed in range(5) for step in range(20) for place in range(3)]
    drawn = {key: draw(*key) for key in numbers}
    assert all(draw(*key) == value for key, value in drawn.items())
    assert len(set(drawn.values())) == 300, "seed 1's step 2 is not seed 2's step 1"
    assert draw(4, 7) == drawn[4, 7, 0]


def test_each_micro_batch_of_a_step_draws_by_its_own_number(tmp_path):
    drawn = []

    class Draws(Toy):
        def loss(self, input_ids, attention_mask, labels):
            drawn.append(torch.rand(1).item())
            return super().loss(input_ids, attention_mask, labels)

    a_run(tmp_path, replace(CONFIG, accumulation=4, max_steps=2), model=Draws(), seed=6)
    expected = []
    for step in (1, 2):
        for place in range(4):
            seed_step(6, step, place)
            expected.append(torch.rand(1).item())
    assert drawn == expected


# Steps that are no numbers


def broken_llama(checkpoint, name):
    """A model with one weight that is infinite, in a layer that is called `name`."""
    model = llama(checkpoint)
    dict(model.named_parameters())[f"{name}.weight"].data.view(-1)[0] = float("inf")
    return model


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj", "model.norm"])
def test_the_first_layer_whose_output_is_not_finite_is_named(checkpoint, layer):
    model = broken_llama(checkpoint, layer)
    found = find(Passes(model), [batch("a:1"), batch("a:2")], seed=1, number=3)
    assert found is not None
    assert (found.layer, found.what, found.micro_batch) == (layer, "output", 0)


def test_where_only_the_gradient_breaks_the_layer_before_is_named(checkpoint):
    model = llama(checkpoint)
    norm = model.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda module, inputs, output: output + (output * 0).abs().sqrt())  # its slope: inf * 0
    found = find(Passes(model), [batch("a:1")], seed=1, number=3)
    assert found is not None
    assert found.layer in ("model.layers.1.input_layernorm", "model.layers.0")
    assert found.what == "gradient"


def test_a_step_that_breaks_by_what_it_draws_breaks_again_when_it_is_looked_for(checkpoint):
    model = llama(checkpoint)
    norm = model.get_submodule("model.layers.0.input_layernorm")
    norm.register_forward_hook(lambda module, inputs, output: output / (torch.rand(()) > 0.1))  # one step in ten
    passes = Passes(model)

    def breaks(number):
        seed_step(1, number)
        return torch.rand(()).item() <= 0.1

    numbers = {broken: [n for n in range(1, 60) if breaks(n) == broken][:3] for broken in (True, False)}
    for broken, some in numbers.items():
        for number in some:
            found = find(passes, [batch("a:1")], seed=1, number=number)
            assert (found is not None) == broken
            assert found is None or found.layer == "model.layers.0.input_layernorm"


class Poisoned(Toy):
    """Breaks where a row holds the id 9."""

    def loss(self, input_ids, attention_mask, labels):
        loss = super().loss(input_ids, attention_mask, labels)
        return loss * float("nan") if bool((input_ids == 9).any()) else loss


def test_a_step_that_breaks_says_where_and_leaves_its_batch(tmp_path):
    class Named(Rows):
        def micro_batch(self, number, place, part=0, parts=1):
            return replace(super().micro_batch(number, place), where=(f"data.jsonl:{place + 1}",))

    rows = [([1, 2, 3], 0)] * 5 + [([9, 9, 9], 0)] + [([1, 2, 3], 0)] * 4
    config = replace(CONFIG, accumulation=2, max_steps=5)
    with pytest.raises(NonFiniteError) as caught:
        a_run(tmp_path, config, model=Poisoned(), batches=Named(rows, shuffle=False))
    folder = tmp_path / "run" / "nonfinite" / "step-000003"
    said = str(caught.value)
    assert said.startswith("step 3: the loss is nan and the gradient norm ")
    assert (
        "it begins in the output of the loss itself, on data.jsonl:6. The parameters are still those of step 2" in said
    )
    assert str(folder) in said
    report = json.loads((folder / "report.json").read_text())
    assert report["examples"] == [["data.jsonl:5"], ["data.jsonl:6"]]
    assert report["origin"] == {"layer": "the loss itself", "what": "output", "micro_batch": 1}
    assert load_file(folder / "batch.safetensors")["1.input_ids"].tolist() == [[9, 9, 9, 0, 0, 0]]
    assert text(Run(tmp_path / "run"), "STATUS").startswith("failed: step 3: the loss is nan")


# Layers that learn nothing


def test_every_b_must_have_a_gradient_that_is_not_zero(checkpoint):
    model = llama(checkpoint)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.loss(**batch("a:1").inputs).backward()
    check_all_moved(parameters)
    silent = "model.layers.1.mlp.down_proj.lora_B.weight"
    parameters[silent].grad = torch.zeros_like(parameters[silent])
    with pytest.raises(
        ConfigError, match=rf"step 1: the gradient of 1 of 14 lora_B is zero: {silent}; nothing that they"
    ):
        check_all_moved(parameters)


def test_a_b_that_moves_in_another_process_is_good(checkpoint, monkeypatch):
    passes = Passes(llama(checkpoint))
    passes.model.loss(**batch("a:1").inputs).backward()
    silent = passes.parameters["model.layers.1.mlp.down_proj.lora_B.weight"]
    silent.grad = torch.zeros_like(silent)
    monkeypatch.setattr(world, "most", lambda *flags: (1.0,) * len(flags))
    check_all_moved(passes.parameters)


def test_the_first_step_looks_at_every_b_and_later_ones_do_not(checkpoint):
    model = llama(checkpoint)
    passes = Passes(model)
    passes.parameters["model.layers.0.mlp.up_proj.lora_B.weight"].register_hook(torch.zeros_like)
    with make_optimizer(passes.moved, OptimizerConfig()) as optimizer:
        with pytest.raises(ConfigError, match="step 1: the gradient of 1 of 14 lora_B is zero"):
            update(passes, optimizer, [batch("a:1")], 1, 1.0)
        update(passes, optimizer, [batch("a:1")], 2, 1.0)


# Steps that stand out


def marked(*lengths):
    """A batch with an example of each length in a row of its own."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    where = tuple(f"d.jsonl:{i + 1}" for i in range(len(lengths)))
    return Batch({"input_ids": torch.zeros_like(mask), "attention_mask": mask, "labels": torch.zeros_like(mask)}, where)


def test_few_labels_and_a_loss_that_jumps_are_told_with_the_longest_example():
    spikes = Spikes()
    batches = [marked(3, 9), marked(4)]
    steps = [(2.0 + 0.01 * (i % 3), 400) for i in range(20)]
    assert [spikes.step(i, loss, labels, 900, batches) for i, (loss, labels) in enumerate(steps)] == [[]] * 20
    [few] = spikes.step(20, 2.0, 40, 900, batches)
    assert few == (
        "step 20: 40 label tokens where 400 are usual, so each weighs 10.0 times as much: "
        "900 tokens and 40 labels, longest example d.jsonl:2 (9 tokens)"
    )
    [jump] = spikes.step(21, 3.5, 400, 900, batches)
    assert jump.startswith("step 21: the loss jumped to 3.5000 from a level of 2.0100: 900 tokens and 400 labels")
    assert spikes.step(22, 2.02, 390, 900, batches) == []


def test_a_run_that_goes_on_knows_the_level_from_its_metrics():
    lines = [{"split": "train", "loss": 2.0, "labels": 400}, {"split": "eval", "loss": 9.0, "labels": 1}] * 12
    assert len(Spikes(lines).step(13, 2.0, 30, 900, [marked(3)])) == 1
    assert Spikes([]).step(1, 2.0, 30, 900, [marked(3)]) == []


def test_the_longest_example_is_found_in_packed_rows_too():
    mask = torch.tensor([[1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 2, 3, 0, 0]])
    packed = Batch({"input_ids": mask, "attention_mask": mask, "labels": mask}, tuple("abcde"))
    assert longest([packed]) == "b (4 tokens)"
    assert longest([Batch({"input_ids": mask, "labels": mask}, ("a", "b"))]) == "a (7 tokens)"


def test_the_longest_example_is_that_of_all_processes(monkeypatch):
    monkeypatch.setattr(world, "from_all", lambda found: [found, ("there:1", 9), ("there:2", 3)])
    assert longest([marked(4, 6)]) == "there:1 (9 tokens)"
    assert longest([marked(4, 12)]).endswith("(12 tokens)")


def test_a_remark_goes_to_the_log_and_changes_nothing(tmp_path):
    rows = [([1, 2, 3, 4, 5, 6], 0)] * 15 + [([7, 8], 0)] + [([1, 2, 3, 4, 5, 6], 0)] * 4
    _, run, _ = a_run(tmp_path, replace(CONFIG, accumulation=1, max_steps=18), batches=Rows(rows, shuffle=False))
    assert "step 16: 1 label tokens where 5 are usual, so each weighs 5.0 times as much" in text(run, "log.txt")


# The longest batch first


class Longest(Rows):
    """Knows its longest batch, and says when it was asked."""

    asked = 0

    def longest(self, number=0, parts=1):
        self.asked += 1
        return collate([max(self.rows, key=lambda row: len(row[0]))])


def test_the_dry_step_changes_no_digit(tmp_path):
    runs = {}
    for name, dry in (("with", True), ("without", False)):
        seed_everything(4)
        batches = Longest(ROWS)
        config = replace(CONFIG, dry_step=dry)
        runs[name] = a_run(tmp_path, config, name, Toy(dropout=0.3), batches, held_out=ROWS[:3])
        assert batches.asked == dry
    assert text(runs["with"][1], "metrics.jsonl") == text(runs["without"][1], "metrics.jsonl")
    assert torch.equal(runs["with"][2].lora_b, runs["without"][2].lora_b)


def test_the_dry_step_takes_the_memory_of_states_and_gradients_and_leaves_no_gradient():
    model = Toy()
    passes = Passes(model)
    parameters = passes.parameters
    optimizer = make_optimizer(parameters, OptimizerConfig())
    seen = []
    model.dropout.register_forward_hook(lambda *_: seen.extend(p.grad is not None for p in parameters.values()))
    dry_step(passes, optimizer, collate(ROWS))
    assert seen == [True, True]
    assert optimizer.state_bytes > 0
    assert not optimizer.state_dict()["state"]
    assert all(p.grad is None for p in parameters.values())


def test_memory_that_runs_out_does_so_before_the_first_step_and_is_told_in_status(tmp_path):
    class Large(Longest):
        def longest(self, number=0, parts=1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        a_run(tmp_path, batches=Large(ROWS))
    run = Run(tmp_path / "run")
    assert text(run, "STATUS") == "failed: out of memory\n"
    assert train_lines(run) == []
