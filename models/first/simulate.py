"""Parts of the simulated line at the model's input size, cached as .npz: `simulate.py OUT.npz SEED DEFECT_SHARE PARTS`.

Preprocessing is `cull`'s definition: an antialiased bilinear resize (PIL's BILINEAR) of the whole frame to the model's input.
"""

import os
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

import spec

WIDTH, HEIGHT, HEAD = 640, 480, 128


def main():
    out, seed, share, parts = sys.argv[1:]
    here = os.path.dirname(os.path.abspath(__file__))
    with tempfile.TemporaryDirectory() as tmp:
        binary = os.path.join(tmp, "render")
        subprocess.run(["rustc", "--edition", "2024", "-O", "-o", binary, os.path.join(here, "render.rs")], check=True)
        renderer = subprocess.Popen([binary, seed, share, "0", parts], stdout=subprocess.PIPE, bufsize=1 << 20)
        rows = []
        for _ in range(int(parts)):
            b = renderer.stdout.read(HEAD + WIDTH * HEIGHT * 4)
            text = (b[:HEAD].decode().strip() + "||||").split("|")
            mask = np.frombuffer(b, np.uint8, WIDTH * HEIGHT, HEAD).reshape(HEIGHT, WIDTH)
            picture = np.frombuffer(b, np.uint8, WIDTH * HEIGHT * 3, HEAD + WIDTH * HEIGHT).reshape(HEIGHT, WIDTH, 3)
            picture = np.asarray(Image.fromarray(picture).resize((spec.WIDTH, spec.HEIGHT), Image.BILINEAR)).transpose(2, 0, 1)
            mask = np.asarray(Image.fromarray(mask).resize((spec.WIDTH, spec.HEIGHT), Image.NEAREST)) > 127
            rows.append((picture, mask, text[0], text[1], *(float(t or 0) for t in text[2:5])))
        renderer.wait()
    names = ("x", "mask", "category", "defect", "size", "contrast", "delta")
    np.savez(out, **{n: np.array([r[k] for r in rows]) for k, n in enumerate(names)})
    print(out, len(rows), "parts")


if __name__ == "__main__":
    main()
