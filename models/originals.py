"""The weights that a quantized model was made from, read again from its checkpoint, one at a time."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from models.checkpoint import open_checkpoint, stored_in_4_bits
from models.errors import CheckpointError
from models.linear import AdaptableLinear, NF4Linear
from models.model import Model
from models.parallel.shares import home
from models.readers import RenamedReader


class Originals:
    """The 16-bit weight of each of some layers: the layer's own, or for a quantized one the checkpoint's.

    Nothing is read before every weight that will be wanted has been found.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, AdaptableLinear], purpose: str) -> None:
        self.layers = layers
        self.reader: RenamedReader | None = None
        # What is shared, or will be, is whole only in its file.
        elsewhere = {n: layer for n, layer in layers.items() if isinstance(layer, NF4Linear) or layer.weight.is_meta}
        self.elsewhere = frozenset(elsewhere)
        if not elsewhere:
            return
        need = f"{purpose} needs the weights as they were before quantization"
        if not isinstance(model, Model) or model.source is None:
            raise ValueError(f"{need}, but this model was not loaded from a checkpoint; load it with models.load")
        _, reader, _ = open_checkpoint(model.source)
        self.reader = RenamedReader(reader, model.parameter_named)
        stored = stored_in_4_bits(self.reader)
        for name, layer in elsewhere.items():
            weight, shape = f"{name}.weight", (layer.out_features, layer.in_features)
            if weight in stored:
                raise ValueError(
                    f"{need}, but {model.source} holds them quantized; load the 16-bit checkpoint with quant=..."
                )
            if self.reader.shapes.get(weight) != shape:
                raise CheckpointError(
                    f"{model.source}: {need}, but it no longer holds {weight} of shape {list(shape)}; "
                    "was it replaced after the model was loaded?"
                )

    def __call__(self, name: str) -> Float[Tensor, "N K"]:
        """A layer's weight in float32 with the values that `load` quantized or kept, on the layer's device."""
        layer, weight = self.layers[name], f"{name}.weight"
        if name not in self.elsewhere:
            return layer.dense_weight().float()
        assert self.reader is not None
        released = self.reader.released_dtype if isinstance(layer, NF4Linear) else None
        original = self.reader.read(weight).to(home(layer.weight), released or layer.dtype)
        if not bool(original.isfinite().all()):
            raise CheckpointError(
                f"{self.reader.where(weight)}: {weight} holds NaN or infinity, which it did not when it was loaded; "
                "fetch it again, and load the model again, which is half changed"
            )
        return original.float()
