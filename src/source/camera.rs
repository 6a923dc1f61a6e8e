//! Cameras through nokhwa (V4L2).
