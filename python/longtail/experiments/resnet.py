"""The residual network for 32 x 32 images (He et al. 2016, section 4.2), with shortcuts that have no parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .methods import Classifier


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, and the shortcut around them; [N, C, H, W]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, input: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(input)))))
        return F.relu(residual + self._shortcut(input))

    def _shortcut(self, input: Tensor) -> Tensor:
        """Option A: every second pixel, and zeros for the channels that are new, half on either side."""
        if self.stride == 1 and not self.added:
            return input
        half = self.added // 2
        return F.pad(input[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))


def resnet(num_classes: int, blocks: int = 5) -> Classifier:
    """ResNet of 6 ``blocks`` + 2 layers, 32 by default: three stages of 16, 32 and 64 channels.

    Convolutions and the last layer start from Kaiming's normal distribution, as in the long-tail papers' code.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for outputs in (16, 32, 64):
        for i in range(blocks):
            layers.append(BasicBlock(inputs, outputs, 2 if i == 0 and outputs > 16 else 1))
            inputs = outputs
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(features, nn.Linear(64, num_classes))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return model
