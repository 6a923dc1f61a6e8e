"""Pseudo-defects on pictures of normal parts: generic damage, none of it drawn by the simulated line's own defect renderer.

The idea is DRAEM's and NSA's (Zavrtanik et al. 2021, Schlueter et al. 2022): train on what normal parts look like when something,
anything, is locally wrong. Lines, spots, bumps, shifts, smears, and patches that belong elsewhere, at every size and contrast.
"""

import torch
import torch.nn.functional as F

# A pixel counts as changed from this many grey levels on, and as unchanged below half of it; between the two it is not judged.
VISIBLE = 6.0


class Pseudo:
    """`damage(x)` for x [N,3,H,W] in 0..255 -> (damaged, change [N,1,H,W] in grey levels: the largest of the three channels)."""

    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)

    def u(self, n, lo=0.0, hi=1.0):
        return torch.rand(n, 1, 1, 1, generator=self.g) * (hi - lo) + lo

    def log(self, n, lo, hi):
        return torch.exp(self.u(n, torch.tensor(lo).log().item(), torch.tensor(hi).log().item()))

    def sign(self, n):
        return (self.u(n) < 0.5).float() * 2 - 1

    def noise(self, n, size, cells):
        """Smooth noise whose features are `size[0] / cells` px."""
        return F.interpolate(torch.randn(n, 1, cells, cells * size[1] // size[0], generator=self.g), size=size, mode="bicubic", align_corners=False)

    def frame(self, n, size, yy, xx):
        """Coordinates about a random centre, turned by a random angle, wobbled so that nothing is straight or round."""
        cx, cy, a = self.u(n, 0, size[1]), self.u(n, 0, size[0]), self.u(n, 0, 6.2832)
        dx, dy = xx - cx, yy - cy
        p, q = torch.cos(a) * dx + torch.sin(a) * dy, torch.cos(a) * dy - torch.sin(a) * dx
        return p, q

    def patch(self, n, size, p, q, ragged):
        """Soft-edged cover 0..1 of a ragged ellipse or box, 2 to 34 px long."""
        w = self.log(n, 1.2, 17.0)
        h = w * self.log(n, 0.3, 1.0)
        ellipse = torch.sqrt((p / w) ** 2 + (q / h) ** 2 + 1e-6)
        box = torch.maximum((p / w).abs(), (q / h).abs())
        r = torch.where(self.u(n) < 0.3, box, ellipse) + ragged * self.u(n, 0, 0.5)
        return torch.sigmoid((1 - r) * h / self.log(n, 0.25, 2.0))

    def line(self, n, size, p, q, ragged):
        """Soft-edged cover of a bent, ragged line, 4 to 40 px long and about 0.5 to 3 px wide."""
        length = self.log(n, 2.0, 20.0)
        bend, jag = self.u(n, -0.05, 0.05), self.u(n, 0, 1.5) * (self.u(n) < 0.5)
        d = (q - bend * p * p - jag * ragged).abs()
        ends = torch.sigmoid((length - p.abs()) * 2)
        return torch.exp(-((d / self.log(n, 0.4, 1.7)) ** 2)) * ends

    def once(self, x, others, size, yy, xx):
        """One pseudo-defect of one kind on each picture."""
        n = len(x)
        p, q = self.frame(n, size, yy, xx)
        ragged = self.noise(n, size, (15, 30, 60)[int(torch.randint(3, (1,), generator=self.g))])
        kind = torch.randint(6, (1,), generator=self.g).item()
        strength = self.log(n, 7.0, 130.0)
        tint = torch.randn(n, 3, 1, 1, generator=self.g) * 0.5 * (self.u(n) < 0.5) + self.sign(n)
        tint = tint / tint.abs().amax(1, keepdim=True)
        if kind <= 1:  # scratch, crack, hair
            cover = self.line(n, size, p, q, ragged)
            y = x + cover * strength * tint
        elif kind == 2:  # spot, stain, discolouration
            cover = self.patch(n, size, p, q, ragged)
            grain = 1 + 0.5 * self.noise(n, size, 60) * (self.u(n) < 0.4)
            y = x + cover * strength * tint * grain
        elif kind == 3:  # dent or bump: lit on one side, dark on the other
            w, h = self.log(n, 1.8, 12.0), self.log(n, 0.5, 1.0)
            r2 = (p / w) ** 2 + (q / (w * h)) ** 2
            y = x + (p / w) * torch.exp(-r2) * strength * 1.6
        elif kind == 4:  # a patch from elsewhere: this part, another part, or something smeared out
            cover = self.patch(n, size, p, q, ragged)
            dy, dx = (int(v) for v in torch.randint(-60, 61, (2,), generator=self.g))
            source = int(torch.randint(3, (1,), generator=self.g))
            if source == 0:
                other = x.roll((dy, dx), (2, 3))
            elif source == 1:
                other = others
            else:
                other = F.interpolate(F.avg_pool2d(x, 8), size=size, mode="bilinear", align_corners=False)
            y = x + (other - x) * cover * self.u(n, 0.35, 1.0)
        else:  # content shifted or stretched by a few pixels
            cover = self.patch(n, size, p, q, ragged)
            sx, sy = self.sign(n) * self.log(n, 0.7, 8.0), self.sign(n) * self.log(n, 0.7, 8.0)
            gx = ((xx + sx[:, 0] * cover[:, 0]) * 2 + 1) / size[1] - 1
            gy = ((yy + sy[:, 0] * cover[:, 0]) * 2 + 1) / size[0] - 1
            y = F.grid_sample(x, torch.stack([gx, gy], -1), padding_mode="reflection", align_corners=False)
        return y

    def damage(self, x):
        n, size = x.shape[0], tuple(x.shape[2:])
        yy, xx = torch.arange(size[0]).float()[:, None], torch.arange(size[1]).float()[None]
        clean, x = x, x.clone()
        # Many at once, for a step costs the same whatever it shows; and a third of the parts stay good.
        damaged = self.u(n)[:, 0, 0, 0] < 0.67
        for _ in range(7):
            hit = torch.nonzero(damaged & (self.u(n)[:, 0, 0, 0] < 0.5))[:, 0]
            if len(hit):
                x[hit] = self.once(x[hit], clean[torch.randperm(n, generator=self.g)[: len(hit)]], size, yy, xx)
        x = x.clamp(0, 255)
        return x, (x - clean).abs().amax(1, keepdim=True)
