"""The adapter that docs/adding-a-backbone.md had before the package's modules moved, for the backbone of that page."""

from contextlib import ExitStack, contextmanager

from fairchem_scd.backbones import Adapter, register_adapter
from fairchem_scd.backbones.hooks import hooked
from toy import ToyBackbone, ToyForces


@register_adapter
class ToyAdapter(Adapter):
    host_class = ToyBackbone
    names = ("toy.ToyBackbone",)

    def vector_head(self):
        return ToyForces(self.backbone)

    @property
    def max_num_elements(self):
        return self.backbone.elements.num_embeddings

    # For SCD: what it embeds, and which blocks it tells the embedding.

    @property
    def scalar_channels(self):
        return self.backbone.channels

    @property
    def num_modulated(self):
        return len(self.backbone.blocks)

    def scalars(self, embedding):
        return embedding["scalars"]

    def element_embeddings(self):
        return (self.backbone.elements,)

    @contextmanager
    def in_pass(self, given, heads):
        with ExitStack() as stack:
            for i, block in enumerate(self.backbone.blocks if given is not None else ()):
                enter = block.norm.register_forward_hook(lambda _, args, normed, i=i: given.scalars(i, normed))
                leave = block.register_forward_hook(lambda _, args, out, i=i: (given.update(i, out[0]), out[1]))
                stack.enter_context(hooked(enter, leave))
            yield

    # For DeNS: where forces are told. Only with features that turn with the structure.

    @property
    def encoding_spec(self):
        return {"lmax_list": [1], "channels": self.backbone.channels, "bound": 1.0}

    @contextmanager
    def encoded(self, encoding):
        x, v = encoding[:, 0], encoding[:, 1:]
        first = self.backbone.blocks[0]
        with hooked(
            self.backbone.elements.register_forward_hook(lambda _, args, out: out + x),
            first.register_forward_pre_hook(lambda _, args: (args[0], args[1] + v, *args[2:])),
            first.register_forward_hook(lambda _, args, out: (out[0], out[1] + v)),
        ):
            yield
