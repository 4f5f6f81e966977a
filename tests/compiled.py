"""What `torch.compile` makes of the operators: one graph, and what eager code computes.

Not collected by name: `test_kernels_ops.py` runs this file in a process without the check of shapes.
"""

import pytest
import torch

import kernels
from models import LoraConfig, attach_lora, load
from models.linear import NF4Linear
from nf4 import QuantConfig
from tests.test_kernels_ops import adapter, stored
from tests.tiny import checkpoint


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiled_layer_computes_what_an_eager_one_does(dropout):
    q, (a, b) = stored(), adapter()
    layer = NF4Linear(q)
    x = torch.randn(2, 5, 64, requires_grad=True)

    def both(x):
        return kernels.nf4_lora_linear(layer(x).repeat(1, 1, 6)[..., :64], q, a, b, 0.5, None, dropout, 3).sin()

    eager = torch.autograd.grad(both(x).sum(), (x, a, b))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(x).sum(), (x, a, b)), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dora", [False, True])
def test_a_whole_quantized_model_with_adapters_compiles_in_one_graph(tmp_path, dora):
    model = load(checkpoint(tmp_path / "model"), quant=QuantConfig(), dtype=torch.float32)
    attach_lora(model, LoraConfig(rank=2, dropout=0.0, dora=dora))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_a_compiled_layer_draws_a_new_mask_each_time():
    q, (a, b) = stored(), adapter()
    x = torch.randn(4, 64)
    compiled = torch.compile(
        lambda x: kernels.nf4_lora_linear(x, q, a, b, 0.5, None, 0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(0)
    assert not torch.equal(compiled(x), compiled(x))
