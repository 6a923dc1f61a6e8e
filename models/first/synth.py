"""Varied pictures for distillation: natural images, procedural surfaces, and made-up defects on both. All from one seed.

The teacher is a function; the student must agree with it on whatever a line may show, so variety matters more than realism.
"""

import glob
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIDE = 288  # side of the cached squares, px


def load_images(folder, cache, recursive=False):
    """All .jpg/.png of `folder` as uint8 [N,3,SIDE,SIDE] (short side resized, centre crop), cached as .npy."""
    if os.path.exists(cache):
        return torch.from_numpy(np.load(cache))
    files = sorted(
        f for e in ("jpg", "png") for f in glob.glob(os.path.join(folder, "**" if recursive else "", "*." + e), recursive=recursive)
    )
    out = np.zeros((len(files), 3, SIDE, SIDE), np.uint8)
    for i, f in enumerate(files):
        im = Image.open(f).convert("RGB")
        s = SIDE / min(im.size)
        im = im.resize((max(SIDE, round(im.width * s)), max(SIDE, round(im.height * s))), Image.BILINEAR)
        x, y = (im.width - SIDE) // 2, (im.height - SIDE) // 2
        out[i] = np.asarray(im.crop((x, y, x + SIDE, y + SIDE))).transpose(2, 0, 1)
    np.save(cache, out)
    return torch.from_numpy(np.load(cache))


class Synth:
    """Makes batches: `batch(n, size)` -> uint8-valued float [n,3,size,size] in 0..255."""

    def __init__(self, pools, weights, seed):
        self.pools, self.weights = pools, torch.tensor(weights, dtype=torch.float)
        self.g = torch.Generator().manual_seed(seed)

    def u(self, *shape, lo=0.0, hi=1.0):
        return torch.rand(*shape, generator=self.g) * (hi - lo) + lo

    def n(self, *shape):
        return torch.randn(*shape, generator=self.g)

    def i(self, hi):
        return int(torch.randint(hi, (1,), generator=self.g))

    def noise(self, n, c, size):
        """Smooth noise at a random, possibly anisotropic scale, about zero mean and unit amplitude."""
        h, w = (max(2, int(size * 2 ** float(self.u(1, lo=-6.0, hi=-0.5)))) for _ in range(2))
        if float(self.u(1)) < 0.6:
            w = h
        return F.interpolate(self.n(n, c, h, w), size=(size, size), mode="bicubic", align_corners=False)

    def natural(self, n, size):
        pool = self.pools[int(torch.multinomial(self.weights, 1, generator=self.g))]
        idx = torch.randint(len(pool), (n,), generator=self.g)
        x = torch.stack([pool[int(k)] for k in idx]).float()
        zoom = 2 ** self.u(n, lo=-1.3, hi=0.35) * size / 224
        rot = self.u(n) < 0.5
        angle = torch.where(rot, self.u(n, lo=-3.1416, hi=3.1416), self.u(n, lo=-0.1, hi=0.1))
        flip = (self.u(n) < 0.5).float() * 2 - 1
        aspect = 2 ** self.u(n, lo=-0.3, hi=0.3)
        c, s = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        shift = self.u(n, 2, lo=-1, hi=1) * (1 - zoom[:, None]).clamp(min=0)
        theta = torch.stack(
            [torch.stack([c * flip * aspect, -s, shift[:, 0]], 1), torch.stack([s * flip * aspect, c, shift[:, 1]], 1)], 1
        )
        return F.grid_sample(x, F.affine_grid(theta, (n, 3, size, size), False), padding_mode="reflection", align_corners=False)

    def procedural(self, n, size):
        yy, xx = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        x = self.u(n, 3, 1, 1, lo=10, hi=245).expand(n, 3, size, size).clone()
        for _ in range(1 + self.i(3)):
            grey = float(self.u(1)) < 0.6
            x += self.noise(n, 1 if grey else 3, size) * self.u(n, 1, 1, 1, hi=30)
        if float(self.u(1)) < 0.4:  # weave, brushed lines, gratings
            for _ in range(1 + self.i(2)):
                a, f = self.u(n, 1, 1, hi=3.1416), 6.2832 / 2 ** self.u(n, 1, 1, lo=1.2, hi=6)
                wave = torch.sin(f * (torch.cos(a) * xx + torch.sin(a) * yy) + self.u(n, 1, 1, hi=6.28))
                x += (wave * self.u(n, 1, 1, lo=3, hi=50))[:, None]
        return x

    def sdf(self, n, size):
        """Signed distance (px, negative inside) of a random disc, ring or rotated rectangle per picture: [n,1,size,size]."""
        yy, xx = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        cx, cy = self.u(n, 1, 1, hi=size), self.u(n, 1, 1, hi=size)
        a = self.u(n, 1, 1, hi=3.1416)
        dx, dy = xx - cx, yy - cy
        p, q = torch.cos(a) * dx + torch.sin(a) * dy, torch.cos(a) * dy - torch.sin(a) * dx
        w, h = (2 ** self.u(n, 1, 1, lo=1, hi=6.5) * size / 224 for _ in range(2))
        box = torch.maximum(p.abs() - w, q.abs() - h)
        disc = torch.sqrt((p / w) ** 2 + (q / h) ** 2 + 1e-6) * torch.minimum(w, h) - torch.minimum(w, h)
        kind = self.u(n, 1, 1)
        d = torch.where(kind < 0.5, box, torch.where(kind < 0.8, disc, (disc.abs() - torch.minimum(w, h) * 0.2)))
        return d[:, None]

    def batch(self, n, size):
        x = torch.cat([self.natural(n - n // 4, size), self.procedural(n // 4, size)])
        x = x[torch.randperm(n, generator=self.g)]
        # shapes on it, filled with flat colour, texture or another picture: parts, components, prints, holes
        for _ in range(self.i(4)):
            cover = torch.sigmoid(-self.sdf(n, size) / self.u(n, 1, 1, 1, lo=0.3, hi=1.5))
            other = self.procedural(n, size) if float(self.u(1)) < 0.6 else x.roll(1, 0)
            x = x + (other - x) * cover * (self.u(n, 1, 1, 1) < 0.35)
        # made-up defects: scratches, spots, stains, smears, at all contrasts
        yy, xx = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        for _ in range(self.i(4)):
            ax, ay = self.u(n, 1, 1, hi=size), self.u(n, 1, 1, hi=size)
            ang, length = self.u(n, 1, 1, hi=6.2832), 2 ** self.u(n, 1, 1, lo=1, hi=7)
            ux, uy = torch.cos(ang), torch.sin(ang)
            bend = self.u(n, 1, 1, lo=-0.01, hi=0.01)
            t = ((xx - ax) * ux + (yy - ay) * uy).clamp(torch.zeros(1), length)
            d = torch.sqrt((xx - ax - t * ux + bend * t * t * uy) ** 2 + (yy - ay - t * uy - bend * t * t * ux) ** 2 + 1e-6)
            cover = torch.sigmoid((2 ** self.u(n, 1, 1, lo=-1, hi=3) - d) / self.u(n, 1, 1, lo=0.3, hi=1.5))[:, None]
            colour = self.u(n, 3, 1, 1, lo=-80, hi=80) * (self.u(n, 1, 1, 1) < 0.3) + self.u(n, 1, 1, 1, lo=-130, hi=130)
            x = x + cover * colour * (self.u(n, 1, 1, 1) < 0.5)
        if float(self.u(1)) < 0.4:
            stain = torch.sigmoid((self.noise(n, 1, size) - self.u(n, 1, 1, 1, lo=0.5, hi=1.5)) * 8)
            x = x + stain * self.u(n, 3, 1, 1, lo=-50, hi=50) * (self.u(n, 1, 1, 1) < 0.5)
        # colour and light
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * torch.where(self.u(n, 1, 1, 1) < 0.25, torch.zeros(1), self.u(n, 1, 1, 1, lo=0.4, hi=1.5))
        x = (x - 128) * 2 ** self.u(n, 1, 1, 1, lo=-1.2, hi=0.5) + 128 + self.u(n, 1, 1, 1, lo=-45, hi=45) + self.u(n, 3, 1, 1, lo=-12, hi=12)
        if float(self.u(1)) < 0.3:
            x = x * (1 + 0.15 * self.noise(n, 1, size).clamp(-2, 2) * (self.u(n, 1, 1, 1) < 0.5))
        # focus and sensor noise
        if float(self.u(1)) < 0.35:
            s = float(self.u(1, lo=0.4, hi=1.6))
            k = torch.exp(-(torch.arange(-4, 5).float() ** 2) / (2 * s * s))
            k = (k / k.sum())[None, None].expand(3, 1, 9)
            x = F.conv2d(F.conv2d(F.pad(x, (4, 4, 4, 4), "reflect"), k[..., None], groups=3), k[:, :, None], groups=3)
        if float(self.u(1)) < 0.5:
            x = x + self.n(n, 3, size, size) * self.u(n, 1, 1, 1, hi=8) * (self.u(n, 1, 1, 1) < 0.6)
        return x.clamp(0, 255).round()
