//! From published EfficientNet weights to the ONNX backbone that the trainer and the line use.
//!
//! Three layers, each of which knows only the one before it: [`pickle`] reads a pickle without running it, [`weights`] finds tensors in a file,
//! [`efficientnet`] knows the network.

pub mod efficientnet;
pub mod pickle;
pub mod weights;
