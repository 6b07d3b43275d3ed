"""The embedding table."""

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding`, but on the meta device without initial weights: drawing them there, for nothing, would import the
    compiler's front end, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
