//! Decode, ROI, resize, normalise: the same code for training, evaluation and the live line, so they cannot drift apart.
//!
//! It knows [`Frame`]s and a [`PreprocessSpec`], nothing of models, files or threads. The resize filter is the triangle of Pillow's
//! `BILINEAR`: half-pixel centres; when shrinking, the support grows with the ratio (antialiased); when enlarging, plain bilinear.
//!
//! It is one pass: a row is decoded when an output row needs it, a few rows are held, and no picture exists between the camera's bytes and the
//! model's input (but for the kinds of JPEG that a library decodes). The arithmetic is in integers, with weights of 14 bits and 7 fraction bits
//! between the passes, so every machine computes the same bits; against exact arithmetic a value is off by a few hundredths of a pixel level.
//!
//! After the first frame of a size and format nothing here allocates, except in the library.

mod mjpg;

use crate::frame::{Frame, PixelFormat};
use crate::kernels::isa::Isa;
use crate::kernels::pixels::{planar_to_rgb, split_triples, yuyv_to_planar};
use crate::kernels::resample::{Columns, Rows, WEIGHT_BITS, horizontal, padded_taps, vertical};
use mjpg::{MjpgDecoder, MjpgError};
use serde::{Deserialize, Serialize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Largest frame width or height in pixels. Industrial cameras end at about 14 000; JPEG itself at 65 535.
pub const MAX_FRAME_SIDE_PX: u32 = 16_384;
/// Largest frame area in pixels (64 megapixels: 192 MB decoded). Larger ones are a mistake or an attack on memory.
pub const MAX_FRAME_AREA_PX: u64 = 64 << 20;
/// Largest model input side in pixels. The paper uses 224; beyond 4096 no CPU keeps up with a line.
pub const MAX_INPUT_SIDE_PX: u32 = 4096;

/// What the model wants to see; part of the bundle's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreprocessSpec {
    /// Model input width in pixels, 1 to [`MAX_INPUT_SIDE_PX`].
    pub width_px: u32,
    /// Model input height in pixels, 1 to [`MAX_INPUT_SIDE_PX`].
    pub height_px: u32,
    /// Per channel (red, green, blue), in 8-bit pixel units: `input = (pixel - mean) / std`.
    pub mean: [f32; 3],
    /// Per channel, in 8-bit pixel units; finite and above zero.
    pub std: [f32; 3],
}

impl PreprocessSpec {
    /// Values in one model input: `3 * height * width`.
    pub fn input_len(&self) -> usize {
        3 * self.width_px as usize * self.height_px as usize
    }

    /// Check the ranges documented on the fields.
    ///
    /// # Errors
    /// [`PreprocessError::Spec`] names the first field out of range.
    pub fn check(&self) -> Result<(), PreprocessError> {
        for (what, side) in [("width_px", self.width_px), ("height_px", self.height_px)] {
            if !(1..=MAX_INPUT_SIDE_PX).contains(&side) {
                return Err(PreprocessError::Spec { what, value: side as f32 });
            }
        }
        for channel in 0..3 {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            if !mean.is_finite() {
                return Err(PreprocessError::Spec { what: "mean", value: mean });
            }
            if !(std.is_finite() && std > 0.0) {
                return Err(PreprocessError::Spec { what: "std", value: std });
            }
        }
        Ok(())
    }
}

/// Part of the picture that is inspected, in frame pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roi {
    /// Left edge.
    pub x_px: u32,
    /// Top edge.
    pub y_px: u32,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
}

impl Roi {
    /// Whether the ROI is non-empty and lies inside a frame of `width_px` x `height_px`.
    pub fn fits(&self, width_px: u32, height_px: u32) -> bool {
        let inside = |start: u32, length: u32, limit: u32| length > 0 && start.checked_add(length).is_some_and(|end| end <= limit);
        inside(self.x_px, self.width_px, width_px) && inside(self.y_px, self.height_px, height_px)
    }
}

/// Why a frame could not become a model input. Every one of these ends in a fault verdict, so in a reject.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PreprocessError {
    /// The specification itself is unusable.
    #[error(
        "preprocessing: `{what}` is {value}; width_px and height_px must be 1 to {MAX_INPUT_SIDE_PX}, std above 0: make the bundle again"
    )]
    Spec {
        /// The field.
        what: &'static str,
        /// Its value.
        value: f32,
    },
    /// The caller's buffer does not hold one input.
    #[error("preprocessing: output buffer holds {actual} values, the model's input has {expected}")]
    OutputLength {
        /// [`PreprocessSpec::input_len`].
        expected: usize,
        /// What the caller gave.
        actual: usize,
    },
    /// Frame size outside the limits.
    #[error(
        "frame is {width_px}x{height_px} pixels; sides must be 1 to {MAX_FRAME_SIDE_PX} and the area at most {MAX_FRAME_AREA_PX}: lower the camera's resolution"
    )]
    FrameSize {
        /// Frame width.
        width_px: u32,
        /// Frame height.
        height_px: u32,
    },
    /// The buffer length does not match size and format: the source lost bytes.
    #[error("{format:?} frame of {width_px}x{height_px} pixels needs {expected} bytes, got {actual}: the source delivered a torn frame")]
    PixelBytes {
        /// Declared format.
        format: PixelFormat,
        /// Frame width.
        width_px: u32,
        /// Frame height.
        height_px: u32,
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        actual: usize,
    },
    /// 4:2:2 needs pairs of pixels.
    #[error("YUYV frame is {width_px} pixels wide; 4:2:2 needs an even width")]
    OddWidth {
        /// Frame width.
        width_px: u32,
    },
    /// ROI empty or outside the frame.
    #[error("roi {}x{} at ({}, {}) does not lie inside the {width_px}x{height_px} frame: correct `roi` in the configuration", roi.width_px, roi.height_px, roi.x_px, roi.y_px)]
    RoiOutside {
        /// The ROI.
        roi: Roi,
        /// Frame width.
        width_px: u32,
        /// Frame height.
        height_px: u32,
    },
    /// Not a decodable picture.
    #[error("JPEG frame of {bytes} bytes is corrupt ({reason}): check the camera's cable and USB bandwidth")]
    Jpeg {
        /// Compressed length.
        bytes: usize,
        /// The decoder's words.
        reason: String,
    },
    /// The JPEG header contradicts the frame.
    #[error("JPEG header says {jpeg_width_px}x{jpeg_height_px} pixels, the source said {width_px}x{height_px}")]
    JpegSize {
        /// Width in the JPEG header.
        jpeg_width_px: u32,
        /// Height in the JPEG header.
        jpeg_height_px: u32,
        /// Width by the source.
        width_px: u32,
        /// Height by the source.
        height_px: u32,
    },
}

/// Turns frames into model inputs. One per thread; it owns its buffers.
pub struct Preprocessor {
    spec: PreprocessSpec,
    roi: Option<Roi>,
    isa: Isa,
    mjpg: MjpgDecoder,
    /// Decoded picture of a JPEG that the library decoded, RGB interleaved.
    decoded: Vec<u8>,
    resizer: Resizer,
}

/// Resize weights of one axis: output `i` is the sum over `t < count` of `weights[i * count + t] * input[start[i] + t]`.
#[derive(Default)]
struct Taps {
    count: usize,
    start: Vec<usize>,
    weights: Vec<i16>,
}

impl Taps {
    /// Pillow's `precompute_coeffs` for the triangle filter in fixed point: the weights of an output sum to `1 << WEIGHT_BITS` exactly (what
    /// rounding takes from one the next one gets). Padded with zero weights to `padded` of what is needed, the same number for all outputs.
    fn plan(input: usize, output: usize, padded: impl Fn(usize) -> usize) -> Self {
        let scale = input as f64 / output as f64;
        let stretch = scale.max(1.0);
        let span = |i: usize| {
            let center = (i as f64 + 0.5) * scale;
            let first = (center - stretch + 0.5).max(0.0) as usize;
            let end = ((center + stretch + 0.5) as usize).min(input);
            (center, first, end)
        };
        let needed = (0..output).map(|i| span(i).2 - span(i).1).max().unwrap_or(1).clamp(1, input);
        let count = padded(needed);
        let (mut starts, mut weights) = (Vec::with_capacity(output), vec![0; output * count]);
        for (i, row) in weights.chunks_exact_mut(count).enumerate() {
            let (center, first, end) = span(i);
            let start = first.min(input - needed);
            let weight = |x: usize| (1.0 - ((x as f64 - center + 0.5) / stretch).abs()).max(0.0);
            let sum: f64 = (first..end).map(weight).sum();
            let (mut exact, mut given) = (0.0, 0);
            for x in first..end {
                exact += weight(x) / sum * f64::from(1 << WEIGHT_BITS);
                let upto = exact.round() as i32;
                row[x - start] = (upto - given) as i16;
                given = upto;
            }
            starts.push(start);
        }
        Self { count, start: starts, weights }
    }

    fn row(&self, i: usize) -> (usize, &[i16]) {
        (self.start[i], &self.weights[i * self.count..(i + 1) * self.count])
    }
}

/// How the rows that are resized lie in memory.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// One byte a pixel.
    Gray,
    /// Red, green, blue, one after the other for each pixel.
    Interleaved,
    /// All of red, all of green, all of blue; the region begins at pixel `margin` of each.
    Planar { margin: usize },
}

/// What is resized to what, and with which kernels.
#[derive(Clone, Copy)]
struct Job<'a> {
    isa: Isa,
    roi: Roi,
    spec: &'a PreprocessSpec,
}

/// Resizes rows of bytes into the model's input.
#[derive(Default)]
struct Resizer {
    /// For which cropped size `across` and `down` were made.
    planned_for: Option<(u32, u32)>,
    across: Columns,
    down: Taps,
    /// The rows that the next outputs need: a ring.
    ring: Vec<u8>,
    /// One row of weighted sums, laid out as the rows are.
    sums: Vec<i16>,
    /// The same for each channel, with room for the kernel to read beyond.
    planes: [Vec<i16>; 3],
}

impl Resizer {
    fn plan(&mut self, roi: Roi, spec: &PreprocessSpec) {
        if self.planned_for != Some((roi.width_px, roi.height_px)) {
            let across = Taps::plan(roi.width_px as usize, spec.width_px as usize, padded_taps);
            self.across = Columns::new(across.start, across.weights);
            self.down = Taps::plan(roi.height_px as usize, spec.height_px as usize, |needed| needed);
            self.planned_for = Some((roi.width_px, roi.height_px));
        }
    }

    /// Rows that lie in memory already, `stride` bytes apart.
    fn resize(&mut self, job: Job<'_>, pixels: &[u8], layout: Layout, stride: usize, out: &mut [f32]) {
        let Job { roi, spec, .. } = job;
        let bytes_per_pixel = if layout == Layout::Gray { 1 } else { 3 };
        let start = roi.y_px as usize * stride + roi.x_px as usize * bytes_per_pixel;
        let rows = Rows { bytes: &pixels[start..], stride, rows: usize::MAX };
        for y in 0..spec.height_px as usize {
            let (first, _) = self.down.row(y);
            self.output_row(job, rows, first, layout, y, out);
        }
    }

    /// Rows that are made when they are needed: `make(y, planes)` writes row `y` of the region as planar red, green, blue of `width` pixels, of
    /// which the region begins at pixel `margin`. Rows are asked for in ascending order, perhaps not all.
    fn stream<E>(
        &mut self,
        job: Job<'_>,
        width: usize,
        margin: usize,
        out: &mut [f32],
        mut make: impl FnMut(usize, [&mut [u8]; 3]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut ring = std::mem::take(&mut self.ring);
        let (stride, held) = (3 * width, self.down.count);
        ring.resize(held * stride, 0);
        let mut made = 0;
        let mut result = Ok(());
        for y in 0..job.spec.height_px as usize {
            let (first, _) = self.down.row(y);
            made = made.max(first);
            while made < first + held && result.is_ok() {
                let row = &mut ring[made % held * stride..][..stride];
                let (red, others) = row.split_at_mut(width);
                let (green, blue) = others.split_at_mut(width);
                result = make(made, [red, green, blue]);
                made += 1;
            }
            if result.is_err() {
                break;
            }
            let rows = Rows { bytes: &ring, stride, rows: held };
            self.output_row(job, rows, first, Layout::Planar { margin }, y, out);
        }
        self.ring = ring;
        result
    }

    /// One row of the model's input from the rows `first`, `first + 1`, …
    fn output_row(&mut self, job: Job<'_>, rows: Rows<'_>, first: usize, layout: Layout, y: usize, out: &mut [f32]) {
        let Job { isa, roi, spec } = job;
        let (width, out_width, out_height) = (roi.width_px as usize, spec.width_px as usize, spec.height_px as usize);
        let (_, weights) = self.down.row(y);
        // Where the plane of each channel begins in `sums`; what the kernel reads beyond the region has no weight.
        let (length, plane) = match layout {
            Layout::Gray => (width, 0),
            Layout::Interleaved => (3 * width, 0),
            Layout::Planar { .. } => (rows.stride, rows.stride / 3),
        };
        self.sums.resize(length + self.across.taps(), 0);
        vertical(isa, rows, first, weights, &mut self.sums[..length]);
        if layout == Layout::Interleaved {
            let padded = width + self.across.taps();
            let [red, green, blue] = &mut self.planes;
            for plane in [&mut *red, &mut *green, &mut *blue] {
                plane.resize(padded, 0);
            }
            split_triples(isa, &self.sums[..length], red, green, blue);
        }
        for channel in 0..3 {
            let row = match layout {
                Layout::Gray => &self.sums[..],
                Layout::Interleaved => &self.planes[channel][..],
                Layout::Planar { margin } => &self.sums[channel * plane + margin..],
            };
            let (mean, std) = (spec.mean[channel], spec.std[channel]);
            let at = (channel * out_height + y) * out_width;
            horizontal(isa, row, &self.across, 1.0 / std, -mean / std, &mut out[at..at + out_width]);
        }
    }
}

impl Preprocessor {
    /// A preprocessor for one model and one region of interest (`None`: the whole frame). What is wrong with `spec` or `roi` is reported by
    /// [`Preprocessor::run`].
    pub fn new(spec: &PreprocessSpec, roi: Option<Roi>) -> Self {
        Self::with_isa(spec, roi, Isa::best())
    }

    /// As [`Preprocessor::new`], with the kernels of one instruction set; every one gives the same values.
    ///
    /// # Panics
    /// [`Preprocessor::run`] does when the instruction set is not there.
    pub fn with_isa(spec: &PreprocessSpec, roi: Option<Roi>, isa: Isa) -> Self {
        let mjpg = MjpgDecoder::new(isa);
        Self { spec: spec.clone(), roi, isa, mjpg, decoded: Vec::new(), resizer: Resizer::default() }
    }

    /// What this preprocessor makes.
    pub fn spec(&self) -> &PreprocessSpec {
        &self.spec
    }

    /// Decode `frame`, crop it to the ROI, resize and normalise it into `out`: `[3, height_px, width_px]` row-major, channels red, green,
    /// blue, `(pixel - mean) / std`.
    ///
    /// # Errors
    /// [`PreprocessError`] for torn or corrupt frames, sizes over the limits, a ROI outside the frame, a wrong buffer length. `out` is
    /// then undefined.
    pub fn run(&mut self, frame: &Frame, out: &mut [f32]) -> Result<(), PreprocessError> {
        self.spec.check()?;
        let expected = self.spec.input_len();
        if out.len() != expected {
            return Err(PreprocessError::OutputLength { expected, actual: out.len() });
        }
        let (width, height) = (frame.width_px, frame.height_px);
        check_size(width, height)?;
        let roi = self.roi.unwrap_or(Roi { x_px: 0, y_px: 0, width_px: width, height_px: height });
        if !roi.fits(width, height) {
            return Err(PreprocessError::RoiOutside { roi, width_px: width, height_px: height });
        }
        let Self { spec, isa, mjpg, decoded, resizer, .. } = self;
        resizer.plan(roi, spec);
        let job = Job { isa: *isa, roi, spec };
        let stride = width as usize * 3;
        match frame.format {
            PixelFormat::Rgb8 => {
                check_bytes(frame, 3)?;
                resizer.resize(job, &frame.pixels, Layout::Interleaved, stride, out);
            }
            PixelFormat::Gray8 => {
                check_bytes(frame, 1)?;
                resizer.resize(job, &frame.pixels, Layout::Gray, width as usize, out);
            }
            PixelFormat::Yuyv => {
                check_yuyv(frame)?;
                // Whole pairs of pixels, one more on either side where the region cuts through one.
                let (left, right) = (roi.x_px as usize & !1, (roi.x_px + roi.width_px).next_multiple_of(2) as usize);
                let row = |y: usize| &frame.pixels[((roi.y_px as usize + y) * width as usize + left) * 2..][..(right - left) * 2];
                resizer.stream(job, right - left, roi.x_px as usize - left, out, |y, [red, green, blue]| {
                    yuyv_to_planar(job.isa, row(y), red, green, blue);
                    Ok::<_, PreprocessError>(())
                })?;
            }
            PixelFormat::Mjpg => match begin_mjpg(mjpg, frame)? {
                true => {
                    let corrupt = |error| jpeg_error(frame, error);
                    resizer.stream(job, width as usize, roi.x_px as usize, out, |y, [red, green, blue]| {
                        mjpg.row(roi.y_px as usize + y, red, green, blue).map_err(corrupt)
                    })?;
                    mjpg.finish().map_err(corrupt)?;
                }
                false => {
                    decode_jpeg(frame, decoded)?;
                    resizer.resize(job, decoded, Layout::Interleaved, stride, out);
                }
            },
        }
        Ok(())
    }
}

/// Make ready to decode an MJPG frame row by row. False for a kind of JPEG that the library must decode.
fn begin_mjpg(decoder: &mut MjpgDecoder, frame: &Frame) -> Result<bool, PreprocessError> {
    let (width_px, height_px) = (frame.width_px, frame.height_px);
    match decoder.begin(&frame.pixels, |width, height| (width, height) == (width_px, height_px)) {
        Ok(size) if size == (width_px, height_px) => Ok(true),
        Ok((jpeg_width_px, jpeg_height_px)) => Err(PreprocessError::JpegSize { jpeg_width_px, jpeg_height_px, width_px, height_px }),
        Err(MjpgError::Unsupported(_)) => Ok(false),
        Err(error) => Err(jpeg_error(frame, error)),
    }
}

fn jpeg_error(frame: &Frame, error: MjpgError) -> PreprocessError {
    let (MjpgError::Corrupt(reason) | MjpgError::Unsupported(reason)) = error;
    PreprocessError::Jpeg { bytes: frame.pixels.len(), reason: reason.to_string() }
}

/// Decode a whole frame to interleaved RGB, 3 bytes a pixel, into `out` (resized as needed). For recorders and tools; [`Preprocessor::run`]
/// decodes by itself.
///
/// # Errors
/// As [`Preprocessor::run`], for size, length and corrupt JPEG.
pub fn decode_rgb(frame: &Frame, out: &mut Vec<u8>) -> Result<(), PreprocessError> {
    check_size(frame.width_px, frame.height_px)?;
    match frame.format {
        PixelFormat::Rgb8 => {
            check_bytes(frame, 3)?;
            out.clear();
            out.extend_from_slice(&frame.pixels);
        }
        PixelFormat::Gray8 => {
            check_bytes(frame, 1)?;
            out.clear();
            out.extend(frame.pixels.iter().flat_map(|&gray| [gray; 3]));
        }
        PixelFormat::Yuyv => {
            check_yuyv(frame)?;
            let width = frame.width_px as usize;
            rows_to_rgb(frame, out, |y, red, green, blue| {
                yuyv_to_planar(Isa::best(), &frame.pixels[2 * y * width..2 * (y + 1) * width], red, green, blue);
                Ok(())
            })?;
        }
        PixelFormat::Mjpg => {
            let mut decoder = MjpgDecoder::new(Isa::best());
            if begin_mjpg(&mut decoder, frame)? {
                rows_to_rgb(frame, out, |y, red, green, blue| decoder.row(y, red, green, blue).map_err(|error| jpeg_error(frame, error)))?;
                decoder.finish().map_err(|error| jpeg_error(frame, error))?;
            } else {
                decode_jpeg(frame, out)?;
            }
        }
    }
    Ok(())
}

/// Interleaved RGB of a whole frame from rows of planar red, green, blue.
fn rows_to_rgb(
    frame: &Frame,
    out: &mut Vec<u8>,
    mut make: impl FnMut(usize, &mut [u8], &mut [u8], &mut [u8]) -> Result<(), PreprocessError>,
) -> Result<(), PreprocessError> {
    let (width, height) = (frame.width_px as usize, frame.height_px as usize);
    out.resize(width * height * 3, 0);
    let mut planes = vec![0; 3 * width];
    let (red, others) = planes.split_at_mut(width);
    let (green, blue) = others.split_at_mut(width);
    for (y, row) in out.chunks_exact_mut(3 * width).enumerate() {
        make(y, red, green, blue)?;
        planar_to_rgb(Isa::best(), red, green, blue, row);
    }
    Ok(())
}

fn check_size(width_px: u32, height_px: u32) -> Result<(), PreprocessError> {
    let side = 1..=MAX_FRAME_SIDE_PX;
    if side.contains(&width_px) && side.contains(&height_px) && u64::from(width_px) * u64::from(height_px) <= MAX_FRAME_AREA_PX {
        Ok(())
    } else {
        Err(PreprocessError::FrameSize { width_px, height_px })
    }
}

fn check_bytes(frame: &Frame, bytes_per_pixel: usize) -> Result<(), PreprocessError> {
    let expected = frame.width_px as usize * frame.height_px as usize * bytes_per_pixel;
    if frame.pixels.len() == expected {
        Ok(())
    } else {
        Err(PreprocessError::PixelBytes {
            format: frame.format,
            width_px: frame.width_px,
            height_px: frame.height_px,
            expected,
            actual: frame.pixels.len(),
        })
    }
}

fn check_yuyv(frame: &Frame) -> Result<(), PreprocessError> {
    if !frame.width_px.is_multiple_of(2) {
        return Err(PreprocessError::OddWidth { width_px: frame.width_px });
    }
    check_bytes(frame, 2)
}

/// One JPEG picture to RGB by the library: kinds that [`mjpg`] does not decode. Strict as far as the library is: a picture that lost bytes is an
/// error, never a picture with grey at the end, because a defect in the lost part would pass as normal.
fn decode_jpeg(frame: &Frame, out: &mut Vec<u8>) -> Result<(), PreprocessError> {
    let bytes = frame.pixels.as_slice();
    let corrupt = |reason: String| PreprocessError::Jpeg { bytes: bytes.len(), reason };
    // Cameras pad after the end marker, so it need not be last; a transfer cut short has none (0xFF is stuffed inside coded data).
    let Some(end) = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xD9]) else {
        return Err(corrupt("no end marker, the transfer was cut short".into()));
    };
    // At an end marker that comes too early (a packet was lost before it) the library goes on with zeros; at the end of its input it gives
    // an error. So it does not get to see the marker. Its look-ahead would take the last few bytes of very small pictures for a loss, and
    // progressive pictures need the marker.
    let coded = if frame.width_px >= MIN_WIDTH_FOR_LOSS_CHECK_PX && is_baseline(bytes) { &bytes[..end] } else { bytes };
    let options = DecoderOptions::default()
        .jpeg_set_out_colorspace(ColorSpace::RGB)
        .set_max_width(MAX_FRAME_SIDE_PX as usize)
        .set_max_height(MAX_FRAME_SIDE_PX as usize)
        .set_strict_mode(true);
    // The decoder is not ours; whatever it does with hostile bytes must cost this frame only.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(coded), options);
        decoder.decode_headers().map_err(|error| corrupt(error.to_string()))?;
        let info = decoder.info().ok_or_else(|| corrupt("no header".into()))?;
        if (u32::from(info.width), u32::from(info.height)) != (frame.width_px, frame.height_px) {
            return Err(PreprocessError::JpegSize {
                jpeg_width_px: info.width.into(),
                jpeg_height_px: info.height.into(),
                width_px: frame.width_px,
                height_px: frame.height_px,
            });
        }
        let expected = frame.width_px as usize * frame.height_px as usize * 3;
        if decoder.output_buffer_size() != Some(expected) {
            return Err(corrupt("it does not decode to RGB".into()));
        }
        out.resize(expected, 0);
        decoder.decode_into(out).map_err(|error| corrupt(error.to_string()))
    }));
    outcome.unwrap_or_else(|_| Err(corrupt("the decoder panicked".into())))
}

/// Narrower pictures may have a last row of blocks shorter than the JPEG library's look-ahead of 8 bytes (a black one of this width has 32).
const MIN_WIDTH_FOR_LOSS_CHECK_PX: u32 = 128;

/// Whether the first frame header (SOFn) of a JPEG is a sequential Huffman one, which is all that cameras send.
fn is_baseline(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xFF, marker, high, low]) = bytes.get(at..at + 4).and_then(|segment| segment.first_chunk::<4>()) {
        match marker {
            0xC0 | 0xC1 => return true,
            0xC2..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => return false,
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Origin;
    use crate::pool::Pooled;
    use proptest::prelude::*;
    use serde_json::Value;

    fn frame(pixels: Vec<u8>, format: PixelFormat, width_px: u32, height_px: u32) -> Frame {
        Frame {
            pixels: Pooled::detached(pixels),
            format,
            width_px,
            height_px,
            captured_ns: 0,
            seq: 0,
            part: None,
            origin: Origin::default(),
        }
    }

    fn identity(width_px: u32, height_px: u32) -> PreprocessSpec {
        PreprocessSpec { width_px, height_px, mean: [0.0; 3], std: [1.0; 3] }
    }

    fn run(spec: &PreprocessSpec, roi: Option<Roi>, frame: &Frame) -> Result<Vec<f32>, PreprocessError> {
        let mut out = vec![f32::NAN; spec.input_len()];
        Preprocessor::new(spec, roi).run(frame, &mut out).map(|()| out)
    }

    fn fixtures() -> Value {
        serde_json::from_str(include_str!("../../tests/fixtures/preprocess.json")).unwrap()
    }

    fn hex(value: &Value) -> Vec<u8> {
        let text = value.as_str().unwrap();
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }

    fn number(value: &Value) -> u32 {
        u32::try_from(value.as_u64().unwrap()).unwrap()
    }

    #[test]
    fn resizing_equals_pillow() {
        for (index, case) in fixtures()["resize"].as_array().unwrap().iter().enumerate() {
            let format = if case["channels"] == 3 { PixelFormat::Rgb8 } else { PixelFormat::Gray8 };
            let frame = frame(hex(&case["pixels"]), format, number(&case["width"]), number(&case["height"]));
            let roi = case["roi"].as_array().map(|r| Roi {
                x_px: number(&r[0]),
                y_px: number(&r[1]),
                width_px: number(&r[2]),
                height_px: number(&r[3]),
            });
            let out = run(&identity(number(&case["out_width"]), number(&case["out_height"])), roi, &frame).unwrap();
            let exact = case["pillow_float"].as_array().unwrap();
            assert_eq!(out.len(), exact.len());
            for (i, (ours, theirs)) in out.iter().zip(exact).enumerate() {
                let theirs = theirs.as_f64().unwrap() as f32;
                assert!((ours - theirs).abs() < 0.05, "case {index}, value {i}: ours {ours}, Pillow (float) {theirs}");
            }
            for (i, (ours, theirs)) in out.iter().zip(hex(&case["pillow_8bit"])).enumerate() {
                assert!((ours - f32::from(theirs)).abs() <= 1.0, "case {index}, value {i}: ours {ours}, Pillow (8 bit) {theirs}");
            }
        }
    }

    #[test]
    fn normalisation_is_per_channel() {
        let spec = PreprocessSpec { width_px: 1, height_px: 1, mean: [10.0, 20.0, 30.0], std: [2.0, 4.0, 5.0] };
        let out = run(&spec, None, &frame(vec![12, 28, 20], PixelFormat::Rgb8, 1, 1)).unwrap();
        for (ours, expected) in out.iter().zip([1.0, 2.0, -2.0]) {
            assert!((ours - expected).abs() < 1e-5, "{out:?}");
        }
        let gray = run(&spec, None, &frame(vec![30], PixelFormat::Gray8, 1, 1)).unwrap();
        for (ours, expected) in gray.iter().zip([10.0, 2.5, 0.0]) {
            assert!((ours - expected).abs() < 1e-5, "{gray:?}");
        }
    }

    /// JPEGs and what libjpeg-turbo decodes them to; see `tests/fixtures/make_mjpg_fixtures.py`.
    fn mjpg_fixtures() -> Vec<Value> {
        serde_json::from_str(include_str!("../../tests/fixtures/mjpg.json")).unwrap()
    }

    fn sha256(bytes: &[u8]) -> String {
        use sha2::{Digest, Sha256};
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn fixture_frame(case: &Value) -> Frame {
        frame(hex(&case["jpeg"]), PixelFormat::Mjpg, number(&case["width"]), number(&case["height"]))
    }

    #[test]
    fn camera_jpegs_decode_to_libjpeg_turbos_pixels() {
        let cases = mjpg_fixtures();
        assert!(cases.len() > 25);
        for case in &cases {
            let (frame, name) = (fixture_frame(case), &case["name"]);
            let ours = begin_mjpg(&mut MjpgDecoder::new(Isa::best()), &frame).unwrap_or_else(|error| panic!("{name}: {error}"));
            let for_library = case["library"] == true;
            assert_eq!(ours, !for_library, "{name}: who decodes it");
            let mut rgb = Vec::new();
            decode_rgb(&frame, &mut rgb).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(for_library || case["rgb_sha256"] == sha256(&rgb), "{name}: not libjpeg-turbo's pixels");
        }
    }

    #[test]
    fn one_decoder_takes_every_kind_after_every_other_and_every_region() {
        let cases = mjpg_fixtures();
        let spec = identity(9, 7);
        let mut whole = Preprocessor::new(&spec, None);
        for (index, case) in cases.iter().enumerate().chain(cases.iter().enumerate().rev()) {
            let frame = fixture_frame(case);
            let mut rgb = Vec::new();
            decode_rgb(&frame, &mut rgb).unwrap();
            let (width, height) = (frame.width_px, frame.height_px);
            let raw = super::tests::frame(rgb, PixelFormat::Rgb8, width, height);
            let mut out = vec![f32::NAN; spec.input_len()];
            whole.run(&frame, &mut out).unwrap();
            assert_eq!(out, run(&spec, None, &raw).unwrap(), "{}: the JPEG path resizes the same picture", case["name"]);
            let part = |side: u32, k: u32| (side * k / 5, (side * (k + 2) / 5 - side * k / 5).max(1));
            let ((x_px, width_px), (y_px, height_px)) = (part(width, index as u32 % 4), part(height, index as u32 / 4 % 4));
            let roi = Some(Roi { x_px: x_px.min(width - width_px), y_px: y_px.min(height - height_px), width_px, height_px });
            assert_eq!(run(&spec, roi, &frame), run(&spec, roi, &raw), "{} {roi:?}", case["name"]);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_input() {
        let camera = &fixtures()["camera_jpeg"];
        let (width, height) = (number(&camera["width"]), number(&camera["height"]));
        let bytes: Vec<u8> = (0..width * height * 3).map(|i| (i * i / 7 % 251) as u8).collect();
        let spec = PreprocessSpec { width_px: 61, height_px: 43, mean: [123.7, 116.3, 103.5], std: [58.4, 57.1, 57.4] };
        for frame in [
            frame(hex(&camera["jpeg"]), PixelFormat::Mjpg, width, height),
            frame(bytes[..(width * height * 2) as usize].to_vec(), PixelFormat::Yuyv, width, height),
            frame(bytes[..(width * height) as usize].to_vec(), PixelFormat::Gray8, width, height),
            frame(bytes.clone(), PixelFormat::Rgb8, width, height),
        ] {
            let inputs: Vec<Vec<f32>> = Isa::all_available()
                .into_iter()
                .map(|isa| {
                    let mut out = vec![f32::NAN; spec.input_len()];
                    Preprocessor::with_isa(&spec, None, isa).run(&frame, &mut out).unwrap();
                    out
                })
                .collect();
            assert!(inputs.iter().all(|input| *input == inputs[0]), "{:?}", frame.format);
        }
    }

    #[test]
    fn a_missing_restart_marker_and_left_over_data_are_errors() {
        let case = mjpg_fixtures().into_iter().find(|case| case["restart"] == true).unwrap();
        let (good, width, height) = (hex(&case["jpeg"]), number(&case["width"]), number(&case["height"]));
        let decode = |bytes: Vec<u8>| decode_rgb(&frame(bytes, PixelFormat::Mjpg, width, height), &mut Vec::new());
        let first = |code: u8| good.windows(2).position(|pair| pair == [0xFF, code]).unwrap();
        // From one restart marker to the next, gone: the picture would go on with the pixels of further down.
        let mut short = good.clone();
        short.drain(first(0xD0)..first(0xD1));
        assert!(matches!(decode(short), Err(PreprocessError::Jpeg { .. })));
        for (extra, accepted) in [(1, true), (16, true), (200, false)] {
            let mut long = good.clone();
            let end = good.len() - 2;
            long.splice(end..end, vec![0; extra]);
            assert_eq!(decode(long).is_ok(), accepted, "{extra} bytes before the end marker");
        }
    }

    #[test]
    fn corrupt_jpeg_is_an_error_and_never_a_panic() {
        let good = hex(&fixtures()["jpeg"][2]["jpeg"]);
        let decode = |bytes: Vec<u8>| decode_rgb(&frame(bytes, PixelFormat::Mjpg, 32, 24), &mut Vec::new());
        assert_eq!(decode(good.clone()), Ok(()));
        for cut in 0..good.len() {
            assert!(matches!(decode(good[..cut].to_vec()), Err(PreprocessError::Jpeg { .. })), "cut at {cut}");
        }
        let mut padded = good.clone();
        padded.extend([0; 100]);
        assert_eq!(decode(padded), Ok(()), "cameras pad after the end marker");
        assert!(matches!(decode(vec![]), Err(PreprocessError::Jpeg { .. })));
        assert!(matches!(
            decode_rgb(&frame(good, PixelFormat::Mjpg, 64, 48), &mut Vec::new()),
            Err(PreprocessError::JpegSize { jpeg_width_px: 32, jpeg_height_px: 24, .. })
        ));
    }

    #[test]
    fn a_packet_lost_before_the_end_marker_is_an_error() {
        let camera = &fixtures()["camera_jpeg"];
        let (good, width, height) = (hex(&camera["jpeg"]), number(&camera["width"]), number(&camera["height"]));
        let decode = |bytes: Vec<u8>| decode_rgb(&frame(bytes, PixelFormat::Mjpg, width, height), &mut Vec::new());
        assert_eq!(decode(good.clone()), Ok(()));
        let coded = good.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap() + 14;
        let data = good.len() - 2 - coded;
        for lost in [data / 2, data / 4, 20] {
            let mut short = good[..good.len() - 2 - lost].to_vec();
            short.extend([0xFF, 0xD9]);
            assert!(matches!(decode(short), Err(PreprocessError::Jpeg { .. })), "last {lost} bytes of coded data lost");
        }
        let black = &fixtures()["black_jpeg"];
        let frame = frame(hex(&black["jpeg"]), PixelFormat::Mjpg, number(&black["width"]), number(&black["height"]));
        assert_eq!(decode_rgb(&frame, &mut Vec::new()), Ok(()), "the shortest rows possible are no loss");
    }

    #[test]
    fn yuyv_is_bt601_limited_range() {
        // Black, white, and the limits' outsides, which clamp.
        let out = run(&identity(4, 1), None, &frame(vec![16, 128, 235, 128, 0, 128, 255, 128], PixelFormat::Yuyv, 4, 1)).unwrap();
        assert_eq!(out, [0.0, 255.0, 0.0, 255.0].repeat(3));
        for (y, u, v) in [(81, 90, 240), (145, 54, 34), (41, 240, 110), (100, 60, 200), (200, 128, 100)] {
            let mut rgb = Vec::new();
            decode_rgb(&frame(vec![y, u, y, v], PixelFormat::Yuyv, 2, 1), &mut rgb).unwrap();
            let (luma, pb, pr) =
                ((f64::from(y) - 16.0) * 255.0 / 219.0, (f64::from(u) - 128.0) * 255.0 / 224.0, (f64::from(v) - 128.0) * 255.0 / 224.0);
            let expected = [luma + 1.402 * pr, luma - 0.344136 * pb - 0.714136 * pr, luma + 1.772 * pb];
            for (ours, expected) in rgb.iter().zip(expected.iter().chain(&expected)) {
                assert!((f64::from(*ours) - expected.clamp(0.0, 255.0)).abs() <= 1.0, "Y{y} U{u} V{v}: {rgb:?} against {expected:?}");
            }
        }
    }

    #[test]
    fn yuyv_roi_equals_the_crop_of_the_decoded_frame() {
        let pixels: Vec<u8> = (0..24 * 10 * 2).map(|i| (i * 37 % 251) as u8).collect();
        let yuyv = frame(pixels, PixelFormat::Yuyv, 24, 10);
        let mut rgb = Vec::new();
        decode_rgb(&yuyv, &mut rgb).unwrap();
        let roi = Some(Roi { x_px: 3, y_px: 2, width_px: 15, height_px: 7 });
        assert_eq!(run(&identity(6, 5), roi, &yuyv), run(&identity(6, 5), roi, &frame(rgb, PixelFormat::Rgb8, 24, 10)));
    }

    #[test]
    fn torn_frames_and_wrong_sizes_are_errors() {
        let spec = identity(2, 2);
        let check = |pixels: usize, format, width, height| run(&spec, None, &frame(vec![0; pixels], format, width, height)).unwrap_err();
        assert!(matches!(check(11, PixelFormat::Rgb8, 2, 2), PreprocessError::PixelBytes { expected: 12, actual: 11, .. }));
        assert!(matches!(check(5, PixelFormat::Gray8, 2, 2), PreprocessError::PixelBytes { expected: 4, .. }));
        assert!(matches!(check(8, PixelFormat::Yuyv, 4, 2), PreprocessError::PixelBytes { expected: 16, .. }));
        assert!(matches!(check(6, PixelFormat::Yuyv, 3, 1), PreprocessError::OddWidth { width_px: 3 }));
        assert!(matches!(check(0, PixelFormat::Rgb8, 0, 5), PreprocessError::FrameSize { .. }));
        assert!(matches!(check(0, PixelFormat::Rgb8, MAX_FRAME_SIDE_PX + 1, 1), PreprocessError::FrameSize { .. }));
        assert!(matches!(check(0, PixelFormat::Rgb8, 16_000, 16_000), PreprocessError::FrameSize { .. }));
        assert!(matches!(check(0, PixelFormat::Mjpg, u32::MAX, u32::MAX), PreprocessError::FrameSize { .. }));
        let good = frame(vec![0; 12], PixelFormat::Rgb8, 2, 2);
        assert_eq!(
            Preprocessor::new(&spec, None).run(&good, &mut [0.0; 3]),
            Err(PreprocessError::OutputLength { expected: 12, actual: 3 })
        );
        for roi in [(0, 0, 3, 1), (2, 0, 1, 1), (0, 0, 0, 1), (u32::MAX, 0, 2, 1)] {
            let roi = Roi { x_px: roi.0, y_px: roi.1, width_px: roi.2, height_px: roi.3 };
            assert!(matches!(run(&spec, Some(roi), &good), Err(PreprocessError::RoiOutside { .. })), "{roi:?}");
        }
        for bad in [
            identity(0, 1),
            identity(1, MAX_INPUT_SIDE_PX + 1),
            PreprocessSpec { std: [1.0, 0.0, 1.0], ..identity(1, 1) },
            PreprocessSpec { mean: [f32::NAN; 3], ..identity(1, 1) },
        ] {
            assert!(matches!(Preprocessor::new(&bad, None).run(&good, &mut []), Err(PreprocessError::Spec { .. })), "{bad:?}");
        }
    }

    #[test]
    fn sizes_may_change_between_frames() {
        let spec = identity(5, 4);
        let mut one = Preprocessor::new(&spec, None);
        let mut out = vec![0.0; spec.input_len()];
        for (width, height) in [(10, 8), (3, 17), (10, 8), (64, 2)] {
            let pixels: Vec<u8> = (0..width * height * 3).map(|i| (i * 31 % 256) as u8).collect();
            let frame = frame(pixels, PixelFormat::Rgb8, width, height);
            one.run(&frame, &mut out).unwrap();
            assert_eq!(run(&spec, None, &frame).unwrap(), out, "{width}x{height}");
        }
    }

    proptest! {
        #[test]
        fn flat_pictures_stay_flat(value in any::<u8>(), w in 1u32..60, h in 1u32..60, ow in 1u32..40, oh in 1u32..40) {
            let out = run(&identity(ow, oh), None, &frame(vec![value; (w * h) as usize], PixelFormat::Gray8, w, h)).unwrap();
            for v in out {
                prop_assert!((v - f32::from(value)).abs() < 1e-3);
            }
        }

        #[test]
        fn results_stay_between_the_extremes_of_the_picture(
            pixels in proptest::collection::vec(any::<u8>(), 12 * 9 * 3), ow in 1u32..40, oh in 1u32..40,
        ) {
            let (low, high) = (f32::from(*pixels.iter().min().unwrap()), f32::from(*pixels.iter().max().unwrap()));
            for v in run(&identity(ow, oh), None, &frame(pixels, PixelFormat::Rgb8, 12, 9)).unwrap() {
                prop_assert!(v >= low - 1e-2 && v <= high + 1e-2);
            }
        }

        #[test]
        fn same_size_is_the_identity(pixels in proptest::collection::vec(any::<u8>(), 7 * 13 * 3)) {
            let out = run(&identity(7, 13), None, &frame(pixels.clone(), PixelFormat::Rgb8, 7, 13)).unwrap();
            for (i, pixel) in pixels.chunks(3).enumerate() {
                for c in 0..3 {
                    prop_assert!((out[c * 91 + i] - f32::from(pixel[c])).abs() < 1e-3);
                }
            }
        }

        #[test]
        fn hostile_jpegs_never_panic(
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
            cut in proptest::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
            case in any::<prop::sample::Index>(),
        ) {
            let cases = mjpg_fixtures();
            let case = case.get(&cases);
            let mut bytes = hex(&case["jpeg"]);
            for (index, value) in flips {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if let Some((a, b)) = cut {
                let (a, b) = (a.index(bytes.len()), b.index(bytes.len()));
                bytes.drain(a.min(b)..a.max(b));
            }
            // Any result is fine. Our decoder has no net under it: a panic fails this test (the library's are caught).
            let frame = frame(bytes, PixelFormat::Mjpg, number(&case["width"]), number(&case["height"]));
            let _ = decode_rgb(&frame, &mut Vec::new());
        }
    }
}
