"""The model's input: what `cull`'s preprocessing makes of a frame, in numbers.

Half of the simulated line's 640x480 in each direction: a 3 px scratch is still more than one pixel wide.
"""

HEIGHT, WIDTH = 240, 320  # px, multiples of 16
STRIDE = 8  # of the anomaly map's grid
GRID = (HEIGHT // STRIDE, WIDTH // STRIDE)
# input = (pixel - MEAN) / STD, the teacher's own
MEAN, STD = 127.0, 128.0
