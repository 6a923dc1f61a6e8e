"""CullNet: the student backbone, and its synthetic-data distillation targets.

Inverted residuals with ReLU6 and linear bottlenecks, no squeeze-excite, taps at strides 2, 4, 8 and 16: everything an int8
kernel likes. Strided convolutions pad at the bottom and right only ("SAME" as TensorFlow does it), because the teacher does: the
feature maps of both then sit at the same pixels and the student need not learn a half-pixel shift.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# Per stage: (stride of the whole network, teacher's channels). The heads regress these.
TEACHER_CHANNELS = (16, 24, 40, 112)

# (output channels, expanded channels, kernel, stride, tap after this block)
BLOCKS = (
    (16, 16, 3, 1, True),  # f2
    (24, 64, 3, 2, False),
    (24, 72, 3, 1, True),  # f4
    (40, 96, 5, 2, False),
    (40, 160, 3, 1, False),
    (40, 160, 3, 1, True),  # f8
    (96, 160, 5, 2, False),
    (96, 288, 5, 1, False),
    (96, 288, 5, 1, False),
    (96, 288, 5, 1, False),
    (96, 288, 5, 1, True),  # f16
)
STEM = 16


def same_pads(kernel: int, stride: int) -> tuple[int, int]:
    """Padding (before, after) of TensorFlow's SAME for an input divisible by the stride."""
    total = kernel - stride
    return total // 2, total - total // 2


class ConvBn(nn.Module):
    """Convolution, batch norm, and ReLU6 unless `linear`. Layout [N, C, H, W]."""

    def __init__(self, cin, cout, kernel, stride=1, groups=1, linear=False):
        super().__init__()
        self.pads = same_pads(kernel, stride)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, 0, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout, momentum=0.02)
        self.linear = linear

    def forward(self, x):
        before, after = self.pads
        if before == after:
            x = F.conv2d(x, self.conv.weight, None, self.conv.stride, before, groups=self.conv.groups)
        else:
            x = self.conv(F.pad(x, (before, after, before, after)))
        x = self.bn(x)
        return x if self.linear else F.relu6(x)

    def folded(self):
        """Weight and bias of the equivalent convolution without batch norm."""
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        return self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale


class Block(nn.Module):
    def __init__(self, cin, cout, mid, kernel, stride):
        super().__init__()
        self.expand = ConvBn(cin, mid, 1) if mid != cin else None
        self.depthwise = ConvBn(mid, mid, kernel, stride, groups=mid)
        self.project = ConvBn(mid, cout, 1, linear=True)
        self.residual = cin == cout and stride == 1

    def forward(self, x):
        y = self.expand(x) if self.expand is not None else x
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class CullNet(nn.Module):
    """`forward([N,3,H,W])` -> four maps at strides 2, 4, 8, 16 with the teacher's channels, each normalised per channel."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBn(3, STEM, 3, 2)
        blocks, cin, taps = [], STEM, []
        for cout, mid, kernel, stride, tap in BLOCKS:
            blocks.append(Block(cin, cout, mid, kernel, stride))
            cin = cout
            if tap:
                taps.append(cout)
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(nn.Conv2d(c, t, 1) for c, t in zip(taps, TEACHER_CHANNELS))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out" if m.groups == 1 else "fan_in", nonlinearity="relu")
        for head in self.heads:  # the targets have unit variance, so start near their mean
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def taps(self, x, frozen=0):
        """The four tapped maps. With `frozen` above zero the stem and that many blocks are used as they are, without gradients."""
        out = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0):
            x = self.stem(x)
        for i, (block, spec) in enumerate(zip(self.blocks, BLOCKS)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= frozen):
                x = block(x)
            if spec[4]:
                out.append(x)
        return out

    def forward(self, x):
        return [head(t) for head, t in zip(self.heads, self.taps(x))]


def multiply_adds(size=224):
    """Multiply-adds of the trunk for a square input of the given side."""
    side = size // 2
    total = 3 * 9 * STEM * side * side
    cin = STEM
    for cout, mid, kernel, stride, _ in BLOCKS:
        if mid != cin:
            total += cin * mid * side * side
        side //= stride
        total += mid * kernel * kernel * side * side + mid * cout * side * side
        cin = cout
    return total


if __name__ == "__main__":
    net = CullNet()
    print("multiply-adds", multiply_adds() / 1e6, "M; parameters", sum(p.numel() for p in net.parameters()))
