"""CullNet with a head that says where something is wrong, at stride 8. Trained on normal parts with pseudo-defects only."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from cullnet import ConvBn, CullNet
from spec import GRID

# (channels of the tap, channels taken over, how it comes to stride 8)
# Fine maps are reduced by their maximum: a 3 px scratch must not be averaged or sampled away.
FUSE = ((16, 24, ("max", 4)), (24, 32, ("max", 2)), (40, 48, None), (96, 48, ("up", 2)))
WIDTH = 96
# Softplus(logit + SHIFT): a positive map whose normal level is small but not flattened to zero.
SHIFT = 6.0


class Detector(nn.Module):
    """`forward([N,3,HEIGHT,WIDTH])` -> logits [N,1,*GRID]; above zero means defective."""

    def __init__(self):
        super().__init__()
        self.backbone = CullNet()
        self.fuse = nn.ModuleList(ConvBn(c, k, 1) for c, k, _ in FUSE)
        self.mix1 = ConvBn(sum(f[1] for f in FUSE), WIDTH, 1)
        self.depthwise = ConvBn(WIDTH, WIDTH, 5, groups=WIDTH)
        self.mix2 = ConvBn(WIDTH, WIDTH, 1)
        self.out = nn.Conv2d(WIDTH, 1, 1)
        for m in (*self.fuse, self.mix1, self.mix2):
            nn.init.kaiming_normal_(m.conv.weight, nonlinearity="relu")
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, -4.0)  # defective cells are rare

    def forward(self, x, frozen=0):
        return self.head(self.backbone.taps(x, frozen))

    def head(self, taps):
        maps = []
        for layer, tap, (_, _, how) in zip(self.fuse, taps, FUSE):
            y = layer(tap)
            if how and how[0] == "max":
                y = F.max_pool2d(y, how[1])
            elif how:
                y = F.interpolate(y, size=GRID, mode="bilinear", align_corners=True)
            maps.append(y)
        y = self.mix1(torch.cat(maps, 1))
        return self.out(self.mix2(self.depthwise(y) + y))

    def anomaly_map(self, x):
        return F.softplus(self(x) + SHIFT)
