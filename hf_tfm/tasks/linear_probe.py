"""Linear probing: a linear classifier on the features of a frozen encoder (He et al. 2021, appendix A.1)."""

import torch
from torch import Tensor, nn


class ProbeHead(nn.Module):
    """Batch norm without parameters, then a linear layer; once trained, both fold into one linear layer.

    Args:
        linear: the classifier to train; features in, classes out.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6)
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, classes)."""
        return self.linear(self.norm(features.float()))

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The linear layer that computes what this head does in eval mode."""
        scale = (self.norm.running_var + self.norm.eps).rsqrt()  # (D,)
        folded = nn.Linear(self.linear.in_features, self.linear.out_features).to(self.linear.weight)
        folded.weight.copy_(self.linear.weight * scale)
        folded.bias.copy_(self.linear.bias - folded.weight @ self.norm.running_mean)
        return folded


def freeze_for_probing(model: nn.Module) -> None:
    """Freeze an image classifier but for its head, and put batch norm before that."""
    model.requires_grad_(False)
    model.classifier = ProbeHead(model.classifier)
    model.classifier.requires_grad_(True)
