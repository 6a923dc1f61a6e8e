//! Inverted bottleneck in float: 1x1 expansion, depthwise convolution, 1x1 projection (and residual), one picture row at a time.
//!
//! Put together from the kernels of its parts, so that it gives what they give, to the bit. What it saves is memory: the expanded picture is
//! several times as wide as input and output, and only as many of its rows as the depthwise kernel is high ever exist, in a ring that stays in the
//! second-level cache. Where the whole expanded picture fits there anyway nothing is gained: [`Bottleneck::pays`]. In integers:
//! [`super::bottleneck8`].

use super::depthwise::{Depthwise, Window};
use super::linear::Linear;
use super::source::Source;

/// Expanded pictures above this size are worth the ring: half of a second-level cache.
const EXPANDED_BYTES: usize = 1 << 20;

/// An inverted bottleneck ready to run.
#[derive(Clone, Debug)]
pub struct Bottleneck {
    /// Absent: the depthwise convolution reads the input itself.
    expand: Option<Linear>,
    depthwise: Depthwise,
    project: Linear,
}

impl Bottleneck {
    /// Whether it is faster than its parts one after the other, for a depthwise convolution of these sizes (measured: benches/README.md).
    pub fn pays(window: Window) -> bool {
        window.input[0] * window.input[1] * window.channels * size_of::<f32>() > EXPANDED_BYTES
    }

    /// The three parts, with their activations.
    ///
    /// # Panics
    /// When one does not give what the next one takes: the caller has checked the model's shapes.
    pub fn new(expand: Option<Linear>, depthwise: Depthwise, project: Linear) -> Self {
        let channels = depthwise.window().channels;
        assert!(expand.as_ref().is_none_or(|expand| expand.outputs() == channels), "expansion of an inverted bottleneck");
        assert_eq!(project.inputs(), channels, "projection of an inverted bottleneck");
        Self { expand, depthwise, project }
    }

    /// Sizes of the depthwise convolution.
    pub fn window(&self) -> Window {
        self.depthwise.window()
    }

    /// Channels of the input.
    pub fn inputs(&self) -> usize {
        self.expand.as_ref().map_or(self.window().channels, Linear::inputs)
    }

    /// Channels of the output.
    pub fn outputs(&self) -> usize {
        self.project.outputs()
    }

    /// Multiply-adds of one run.
    pub fn multiply_adds(&self) -> usize {
        let (w, area) = (self.window(), |[height, width]: [usize; 2]| height * width);
        let expand = if self.expand.is_some() { area(w.input) * self.inputs() } else { 0 };
        w.channels * (expand + area(w.output) * (area(w.kernel) + self.outputs()))
    }

    /// Values of scratch memory that a run takes.
    pub fn scratch_len(&self) -> usize {
        self.ring_len(self.expand.is_some()) + self.row_len()
    }

    /// Values of scratch memory that a run takes whose input rows are made ([`Source::Made`]).
    pub fn scratch_len_made(&self) -> usize {
        self.ring_len(true) + self.row_len()
    }

    fn row_len(&self) -> usize {
        self.window().output[1] * self.window().channels
    }

    /// Rows of the ring: a power of two, so that a row's place is a mask away.
    fn rows(&self) -> usize {
        self.window().kernel[0].next_power_of_two()
    }

    /// What the depthwise convolution reads lies in a ring (`used`) where it is not the input as a whole.
    fn ring_len(&self, used: bool) -> usize {
        let w = self.window();
        if used { self.rows() * w.input[1] * w.channels } else { 0 }
    }

    /// `input` gives rows of `[width, inputs]` and is asked for each at most once, in order, where they are made; `residual` and `out` are output rows
    /// from `first` on, `[rows, width, outputs]`: as many as `out` has room for, so that threads can share a picture. Allocates nothing.
    ///
    /// # Panics
    /// When the lengths do not fit; `scratch` is at least [`Bottleneck::scratch_len`] long, or [`Bottleneck::scratch_len_made`].
    pub fn run(&self, mut input: Source<'_>, residual: Option<&[f32]>, first: usize, out: &mut [f32], scratch: &mut [f32]) {
        let w = self.window();
        let line = w.output[1] * self.outputs();
        let input_line = w.input[1] * self.inputs();
        assert!(input.fits(w.input[0], input_line), "input of an inverted bottleneck");
        assert!(
            out.len().is_multiple_of(line.max(1)) && first + out.len() / line.max(1) <= w.output[0],
            "output of an inverted bottleneck"
        );
        assert!(residual.is_none_or(|residual| residual.len() == out.len()), "residual of an inverted bottleneck");
        let ring_len = self.ring_len(self.expand.is_some() || matches!(input, Source::Made { .. }));
        let (ring, row) = scratch[..ring_len + self.row_len()].split_at_mut(ring_len);
        let ring_line = w.input[1] * w.channels;
        let mut next = 0;
        for (at, out) in out.chunks_exact_mut(line.max(1)).enumerate() {
            let oy = first + at;
            let start = (oy * w.stride[0]).saturating_sub(w.pad[0]);
            let end = (oy * w.stride[0] + w.kernel[0]).saturating_sub(w.pad[0]).min(w.input[0]);
            match (&self.expand, &mut input) {
                (None, Source::Picture(picture)) => self.depthwise.run_rows(picture, oy, row),
                (expand, input) => {
                    for y in start.max(next)..end {
                        let to = &mut ring[y % self.rows() * ring_line..][..ring_line];
                        match expand {
                            Some(expand) => expand.run(input.row(y, input_line), None, to),
                            None => input.copy_row(y, to),
                        }
                    }
                    next = next.max(end);
                    self.depthwise.run_ring(ring, self.rows(), oy, row);
                }
            }
            self.project.run(row, residual.map(|residual| &residual[at * line..][..line]), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::linear::Activation;
    use super::super::testing::{made, values};
    use super::*;
    use proptest::prelude::*;

    /// Against the parts over whole pictures, to the bit, in one piece and in two.
    fn check(inputs: Option<usize>, outputs: usize, w: Window, seed: u64) {
        let area = |[height, width]: [usize; 2]| height * width;
        let width = inputs.unwrap_or(w.channels);
        let input = values(area(w.input) * width, seed);
        let residual = values(area(w.output) * outputs, seed + 1);
        for isa in Isa::all_available() {
            let linear = |inputs: usize, outputs: usize, activation, seed| {
                Linear::new(&values(inputs * outputs, seed), &values(outputs, seed + 1), inputs, outputs, activation, isa)
            };
            let expand = inputs.map(|inputs| linear(inputs, w.channels, Activation::Relu6, seed + 2));
            let weight = values(w.channels * area(w.kernel), seed + 4);
            let depthwise = Depthwise::new(&weight, &values(w.channels, seed + 5), w, Activation::Relu6, isa);
            let project = linear(w.channels, outputs, Activation::None, seed + 6);
            let mut wide = vec![0.0; area(w.input) * w.channels];
            match &expand {
                Some(expand) => expand.run(&input, None, &mut wide),
                None => wide.copy_from_slice(&input),
            }
            let (mut mid, mut wanted) = (vec![0.0; area(w.output) * w.channels], vec![0.0; area(w.output) * outputs]);
            depthwise.run(&wide, &mut mid);
            project.run(&mid, Some(&residual), &mut wanted);
            let layer = Bottleneck::new(expand, depthwise, project);
            for split in [0, w.output[0] / 2] {
                // What an earlier layer left must not matter.
                let mut scratch = vec![f32::NAN; layer.scratch_len_made() + 5];
                let mut got = vec![f32::NAN; wanted.len()];
                let at = split * w.output[1] * outputs;
                let (upper, lower) = got.split_at_mut(at);
                layer.run(Source::Picture(&input), Some(&residual[..at]), 0, upper, &mut scratch);
                // The second part from rows that are made.
                made(&input, w.input[1] * width, |rows| layer.run(rows, Some(&residual[at..]), split, lower, &mut scratch));
                assert_eq!(got, wanted, "{} {w:?} {inputs:?} -> {outputs}, split {split}", isa.name());
            }
        }
    }

    fn window(channels: usize, input: [usize; 2], kernel: usize, stride: usize, pad: usize) -> Window {
        let out = |side: usize| (side + 2 * pad - kernel) / stride + 1;
        Window { channels, input, output: [out(input[0]), out(input[1])], kernel: [kernel; 2], stride: [stride; 2], pad: [pad; 2] }
    }

    #[test]
    fn the_sizes_of_the_model_agree_to_the_bit() {
        check(Some(16), 24, window(96, [14, 28], 3, 2, 1), 1);
        check(Some(40), 112, window(240, [7, 14], 5, 1, 2), 2);
        check(None, 16, window(32, [9, 30], 3, 1, 1), 3);
        // Padded below and to the right only, as TensorFlow pads with stride 2.
        check(Some(24), 40, Window { output: [7, 7], pad: [0, 0], ..window(72, [14, 14], 3, 2, 1) }, 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_agrees_to_the_bit(
            inputs in 0usize..20, channels in 1usize..50, outputs in 1usize..60, height in 1usize..10, width in 1usize..20, kernel in 1usize..8,
            stride in 1usize..4, pad in 0usize..4, seed: u64,
        ) {
            prop_assume!(pad < kernel && height + 2 * pad >= kernel && width + 2 * pad >= kernel);
            check((inputs > 0).then_some(inputs), outputs, window(channels, [height, width], kernel, stride, pad), seed >> 8);
        }
    }
}
