//! Camera JPEGs, decoded into buffers that are kept: nothing is allocated per frame after the first of a size.
//!
//! What UVC cameras send is baseline Huffman JPEG in one scan: 4:2:2, 4:2:0, 4:4:4 or grey, often without Huffman tables (then those of
//! ITU-T T.81 annex K apply), sometimes with restart markers. That is what this module decodes, to the same pixels as libjpeg-turbo with its
//! default settings ("islow" inverse DCT, "fancy" chroma upsampling). Anything else (progressive, arithmetic, RGB or CMYK, other sampling) is
//! [`MjpgError::Unsupported`], which is for a library to decode.
//!
//! It is strict where libjpeg is lenient: a picture of which bytes are missing, damaged or left over is an error and never a picture with
//! something made up in it, since a defect in that place would pass as normal.
//!
//! Rows come out one by one, in order, as planar red, green, blue; only two rows of blocks are held at a time. It knows bytes, no frames.

use crate::kernels::idct::{GROUP, GROUP_LEN, GROUP_WIDTH, idct, idct_flat};
use crate::kernels::isa::Isa;
use crate::kernels::pixels::{upsample_h2v1, upsample_h2v2, ycc_to_planar};

/// Bytes that cameras may leave between the last coded pixel and the end marker; libjpeg's users know them as "extraneous bytes before marker".
/// More of them mean that coded data was lost or damaged on the way.
const MAX_LEFT_OVER: usize = 16;
/// Zeros behind each piece of coded data, so that reading ahead stays inside the buffer.
const PADDING: usize = 16;
/// Codes up to this length, with the bits that follow them if both fit, are looked up in one step.
const LOOK: u32 = 10;

/// Position in the zigzag order -> `8 * row + column`.
const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56,
    57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Position in the zigzag order -> place in a group's coefficients, less the block's own offset.
const PLACE: [u8; 64] = {
    let mut place = [0; 64];
    let mut k = 0;
    while k < 64 {
        place[k] = ZIGZAG[k] / 8 * GROUP_WIDTH as u8 + ZIGZAG[k] % 8;
        k += 1;
    }
    place
};

/// Why a picture was not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MjpgError {
    /// A kind of JPEG that this module leaves to the library.
    Unsupported(&'static str),
    /// Damaged, truncated or contradictory.
    Corrupt(&'static str),
}

use MjpgError::{Corrupt, Unsupported};

/// How many chroma samples there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sampling {
    Gray,
    S444,
    S422,
    S420,
}

/// A Huffman table as the file has it: how many codes of each length, and their symbols.
#[derive(Clone, PartialEq)]
struct Spec {
    counts: [u8; 16],
    symbols: [u8; 256],
}

/// A Huffman table ready for use. Kept as long as the file's table stays the same, which it does for every frame of a camera.
struct Huffman {
    spec: Option<Spec>,
    /// By the next [`LOOK`] bits: see [`Entry`]. 0 where the code is longer.
    look: Box<[u32; 1 << LOOK]>,
    /// For codes longer than [`LOOK`]: first code of each length, left-aligned to 16 bits, one past the last, and the first symbol's index.
    limits: [(u32, u32, u16); 17],
}

/// What a look-up says, in bits: 0 to 5 bits to consume; 6 to 9 further bits that make the value (0 when `value` has it already);
/// 10 to 13 zeros before it; 14 end of block; 15 valid; 16 to 31 the value.
struct Entry;

impl Entry {
    const END: u32 = 1 << 14;
    const VALID: u32 = 1 << 15;

    fn packed(length: u32, symbol: u8) -> u32 {
        let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        let end = if size == 0 && run != 15 { Self::END } else { 0 };
        Self::VALID | end | (run << 10) | (size << 6) | length
    }

    /// With the value's bits in it.
    fn with_value(length: u32, symbol: u8, value: i32) -> u32 {
        ((value as u32) << 16) | Self::VALID | (u32::from(symbol >> 4) << 10) | (length + u32::from(symbol & 15))
    }
}

/// The value that `size` bits mean (T.81 F.2.2.1): the upper half as it is, the lower half negative.
#[inline(always)]
fn extend(bits: u32, size: u32) -> i32 {
    let bits = bits as i32;
    if size > 0 && bits < 1 << (size - 1) { bits - (1 << size) + 1 } else { bits }
}

impl Huffman {
    fn new() -> Self {
        Self { spec: None, look: Box::new([0; 1 << LOOK]), limits: [(0, 0, 0); 17] }
    }

    fn set(&mut self, spec: &Spec) -> Result<(), MjpgError> {
        if self.spec.as_ref() == Some(spec) {
            return Ok(());
        }
        self.spec = None;
        self.look.fill(0);
        self.limits = [(0, 0, 0); 17];
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(spec.counts[length as usize - 1]);
            let Some(symbols) = spec.symbols.get(index..index + count) else { return Err(Corrupt("a Huffman table is too long")) };
            if code + count as u32 > 1 << length {
                return Err(Corrupt("a Huffman table has more codes than there are"));
            }
            let align = 16 - length;
            self.limits[length as usize] = (code << align, (code + count as u32) << align, index as u16);
            for (&symbol, code) in symbols.iter().zip(code..).take(if length <= LOOK { count } else { 0 }) {
                let (size, free) = (u32::from(symbol & 15), LOOK - length);
                for rest in 0..1u32 << free {
                    let at = (code << free | rest) as usize;
                    self.look[at] = if size > 0 && size <= free {
                        Entry::with_value(length, symbol, extend(rest >> (free - size), size))
                    } else {
                        Entry::packed(length, symbol)
                    };
                }
            }
            code = (code + count as u32) << 1;
            index += count;
        }
        self.spec = Some(spec.clone());
        Ok(())
    }

    /// The entry of a code longer than [`LOOK`], or 0 where there is none. `next` are the next 16 bits.
    #[cold]
    fn long(&self, next: u32, spec: &Spec) -> u32 {
        for length in LOOK + 1..=16 {
            let (first, end, index) = self.limits[length as usize];
            if (first..end).contains(&next) {
                let at = usize::from(index) + ((next - first) >> (16 - length)) as usize;
                return spec.symbols.get(at).map_or(0, |&symbol| Entry::packed(length, symbol));
            }
        }
        0
    }
}

/// Reads bits from unstuffed coded data.
struct Bits<'a> {
    data: &'a [u8],
    /// Next byte to load.
    at: usize,
    /// The next bits, left-aligned.
    window: u64,
    /// Bits in `window`.
    count: u32,
}

impl Bits<'_> {
    /// At least 56 bits afterwards; zeros beyond the end of the data.
    #[inline(always)]
    fn refill(&mut self) {
        let next =
            self.data.get(self.at..self.at + 8).and_then(|bytes| bytes.first_chunk::<8>()).map_or(0, |bytes| u64::from_be_bytes(*bytes));
        self.window |= next >> self.count;
        let bytes = (63 - self.count) >> 3;
        self.at += bytes as usize;
        self.count += bytes * 8;
    }

    #[inline(always)]
    fn consume(&mut self, bits: u32) {
        self.window <<= bits;
        self.count -= bits;
    }

    /// Take `size` bits, 0 to 16.
    #[inline(always)]
    fn take(&mut self, size: u32) -> u32 {
        // Two shifts: one by 64 would be undefined for no bits.
        let bits = (self.window >> 1 >> (63 - size)) as u32;
        self.consume(size);
        bits
    }

    /// Next symbol's entry; its code is not consumed yet. 0 where there is no such code.
    #[inline(always)]
    fn look(&self, table: &Huffman, spec: &Spec) -> u32 {
        match table.look[(self.window >> (64 - LOOK)) as usize] {
            0 => table.long((self.window >> 48) as u32, spec),
            entry => entry,
        }
    }

    /// Bytes used so far, the last one perhaps in part.
    fn position(&self) -> usize {
        self.at - (self.count / 8) as usize
    }
}

/// One component of the picture.
struct Component {
    id: u8,
    quantization: u8,
    dc_table: u8,
    ac_table: u8,
    /// Blocks of one MCU: across and down.
    blocks: (usize, usize),
    /// Rows of samples that belong to the picture.
    height: usize,
    /// Samples of a row that belong to the picture.
    width: usize,
    /// Dequantized coefficients of one MCU row: `[row of blocks][group][GROUP_LEN]`.
    coefficients: Vec<i16>,
    groups: usize,
    /// Whether a group has coefficients other than the first of each block, `[row of blocks][group]`.
    detailed: Vec<bool>,
    /// Samples of two MCU rows, the even and the odd one.
    samples: Vec<u8>,
    last_dc: i32,
}

impl Component {
    fn new() -> Self {
        Self {
            id: 0,
            quantization: 0,
            dc_table: 0,
            ac_table: 0,
            blocks: (1, 1),
            height: 0,
            width: 0,
            coefficients: Vec::new(),
            groups: 0,
            detailed: Vec::new(),
            samples: Vec::new(),
            last_dc: 0,
        }
    }

    fn stride(&self) -> usize {
        self.groups * GROUP_WIDTH
    }

    /// Row `y` of the samples, while its MCU row is one of the last two.
    fn row(&self, y: usize) -> &[u8] {
        let start = y % (2 * 8 * self.blocks.1) * self.stride();
        &self.samples[start..start + self.width]
    }
}

/// Decodes one picture after the other into buffers of its own.
pub(super) struct MjpgDecoder {
    isa: Isa,
    width: usize,
    height: usize,
    sampling: Sampling,
    components: [Component; 3],
    quantization: [Option<[u16; 64]>; 4],
    /// DC tables 0 to 3, AC tables 0 to 3.
    specs: [Option<Spec>; 8],
    tables: [Huffman; 8],
    /// Coded data without byte stuffing, each piece (up to a restart marker) followed by [`PADDING`] zeros.
    data: Vec<u8>,
    /// Start and end of each piece in `data`.
    pieces: Vec<(usize, usize)>,
    /// MCUs between restart markers; 0 for none.
    restart_interval: usize,
    mcus_across: usize,
    mcu_rows: usize,
    /// MCU rows decoded so far.
    decoded: usize,
    /// Piece being read, and where it goes on: its byte position, the window and its bits.
    piece: usize,
    state: (usize, u64, u32),
    /// MCUs left in this piece.
    left_in_piece: usize,
    chroma: [Vec<u8>; 2],
}

/// A cursor over the marker segments.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn u8(&mut self) -> Result<u8, MjpgError> {
        let byte = self.bytes.get(self.at).copied().ok_or(Corrupt("it ends in the middle of its header"))?;
        self.at += 1;
        Ok(byte)
    }

    fn u16(&mut self) -> Result<u16, MjpgError> {
        Ok(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], MjpgError> {
        let bytes = self.bytes.get(self.at..self.at.saturating_add(length)).ok_or(Corrupt("it ends in the middle of its header"))?;
        self.at += length;
        Ok(bytes)
    }

    /// The content of a segment.
    fn segment(&mut self) -> Result<Reader<'a>, MjpgError> {
        let length = usize::from(self.u16()?).checked_sub(2).ok_or(Corrupt("a segment is shorter than its length field"))?;
        Ok(Reader { bytes: self.take(length)?, at: 0 })
    }

    fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// The next marker: 0xFF, perhaps repeated, and a code.
    fn marker(&mut self) -> Result<u8, MjpgError> {
        if self.u8()? != 0xFF {
            return Err(Corrupt("there is no marker where one must be"));
        }
        loop {
            match self.u8()? {
                0xFF => continue,
                code => return Ok(code),
            }
        }
    }
}

impl MjpgDecoder {
    /// A decoder whose kernels use `isa`. It allocates its tables now and the rest at the first picture of each size.
    pub(super) fn new(isa: Isa) -> Self {
        Self {
            isa,
            width: 0,
            height: 0,
            sampling: Sampling::Gray,
            components: std::array::from_fn(|_| Component::new()),
            quantization: [None; 4],
            specs: [const { None }; 8],
            tables: std::array::from_fn(|_| Huffman::new()),
            data: Vec::new(),
            pieces: Vec::new(),
            restart_interval: 0,
            mcus_across: 0,
            mcu_rows: 0,
            decoded: 0,
            piece: 0,
            state: (0, 0, 0),
            left_in_piece: 0,
            chroma: [Vec::new(), Vec::new()],
        }
    }

    /// Read the header of a picture and make ready for its rows. Returns width and height in pixels; nothing is allocated for a picture larger
    /// than `limit` allows (width, height).
    pub(super) fn begin(&mut self, bytes: &[u8], limit: impl Fn(u32, u32) -> bool) -> Result<(u32, u32), MjpgError> {
        self.quantization = [None; 4];
        self.specs = [const { None }; 8];
        self.restart_interval = 0;
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(2) != Ok(&[0xFF, 0xD8]) {
            return Err(Corrupt("it does not begin as a JPEG"));
        }
        let (mut frame, mut jfif, mut adobe) = (None, false, None);
        loop {
            match reader.marker()? {
                0xC0 | 0xC1 => {
                    if frame.is_some() {
                        return Err(Corrupt("it has two frame headers"));
                    }
                    frame = Some(self.frame_header(reader.segment()?)?);
                }
                0xC4 => self.huffman_tables(reader.segment()?)?,
                0xC2 | 0xC3 | 0xC5..=0xCF => return Err(Unsupported("not baseline")),
                0xDA => break,
                0xDB => self.quantization_tables(reader.segment()?)?,
                0xDD => self.restart_interval = usize::from(reader.segment()?.u16()?),
                0xE0 => jfif |= reader.segment()?.bytes.starts_with(b"JFIF\0"),
                0xEE => {
                    let bytes = reader.segment()?.bytes;
                    if bytes.starts_with(b"Adobe") {
                        adobe = bytes.get(11).copied();
                    }
                }
                0xD8 | 0xD9 => return Err(Corrupt("it has no picture in it")),
                0x01 | 0xD0..=0xD7 => {}
                _ => {
                    reader.segment()?;
                }
            }
        }
        let Some(count) = frame else { return Err(Corrupt("it has no frame header")) };
        // As libjpeg guesses the colours of three components.
        let ids = [0, 1, 2].map(|i| self.components[i].id);
        if count == 3 && !jfif && (adobe == Some(0) || adobe.is_none() && ids == *b"RGB") {
            return Err(Unsupported("RGB"));
        }
        if !limit(self.width as u32, self.height as u32) {
            return Ok((self.width as u32, self.height as u32));
        }
        self.scan_header(reader.segment()?, count)?;
        self.lay_out(count);
        self.unstuff(&bytes[reader.at..])?;
        self.start_piece(0)?;
        self.decoded = 0;
        Ok((self.width as u32, self.height as u32))
    }

    /// Number of components.
    fn frame_header(&mut self, mut header: Reader<'_>) -> Result<usize, MjpgError> {
        if header.u8()? != 8 {
            return Err(Unsupported("not 8 bits"));
        }
        (self.height, self.width) = (header.u16()?.into(), header.u16()?.into());
        if self.width == 0 || self.height == 0 {
            return Err(Unsupported("its size is not in its header"));
        }
        let count = usize::from(header.u8()?);
        if count != 1 && count != 3 {
            return Err(Unsupported("neither grey nor three colours"));
        }
        let mut factors = [(1, 1); 3];
        for (component, factor) in self.components.iter_mut().zip(&mut factors).take(count) {
            component.id = header.u8()?;
            let sampling = header.u8()?;
            *factor = (sampling >> 4, sampling & 15);
            component.quantization = header.u8()?;
            if component.quantization > 3 {
                return Err(Corrupt("a component names a quantization table that cannot be"));
            }
        }
        self.sampling = match (count, factors) {
            // The blocks of a single component come in rows, whatever its factors say.
            (1, _) => Sampling::Gray,
            (_, [(1, 1), (1, 1), (1, 1)]) => Sampling::S444,
            (_, [(2, 1), (1, 1), (1, 1)]) => Sampling::S422,
            (_, [(2, 2), (1, 1), (1, 1)]) => Sampling::S420,
            _ => return Err(Unsupported("its chroma sampling")),
        };
        Ok(count)
    }

    fn huffman_tables(&mut self, mut segment: Reader<'_>) -> Result<(), MjpgError> {
        while !segment.is_empty() {
            let class_and_index = segment.u8()?;
            let (class, index) = (usize::from(class_and_index >> 4), usize::from(class_and_index & 15));
            if class > 1 || index > 3 {
                return Err(Corrupt("a Huffman table that cannot be"));
            }
            let mut spec = Spec { counts: [0; 16], symbols: [0; 256] };
            spec.counts.copy_from_slice(segment.take(16)?);
            let total = spec.counts.iter().map(|&count| usize::from(count)).sum::<usize>();
            let Some(symbols) = spec.symbols.get_mut(..total) else { return Err(Corrupt("a Huffman table is too long")) };
            symbols.copy_from_slice(segment.take(total)?);
            self.specs[class * 4 + index] = Some(spec);
        }
        Ok(())
    }

    fn quantization_tables(&mut self, mut segment: Reader<'_>) -> Result<(), MjpgError> {
        while !segment.is_empty() {
            let precision_and_index = segment.u8()?;
            let Some(place) = self.quantization.get_mut(usize::from(precision_and_index & 15)) else {
                return Err(Corrupt("a quantization table that cannot be"));
            };
            let mut table = [0; 64];
            for entry in &mut table {
                *entry = if precision_and_index >> 4 == 0 { segment.u8()?.into() } else { segment.u16()? };
            }
            *place = Some(table);
        }
        Ok(())
    }

    fn scan_header(&mut self, mut header: Reader<'_>, count: usize) -> Result<(), MjpgError> {
        if usize::from(header.u8()?) != count {
            return Err(Unsupported("more than one scan"));
        }
        for i in 0..count {
            let (id, tables) = (header.u8()?, header.u8()?);
            if id != self.components[i].id {
                return Err(Corrupt("the scan's components are not the frame's"));
            }
            let (dc, ac) = (tables >> 4, tables & 15);
            if dc > 3 || ac > 3 {
                return Err(Corrupt("the scan names a Huffman table that cannot be"));
            }
            self.components[i].dc_table = dc;
            self.components[i].ac_table = 4 + ac;
            for table in [dc, 4 + ac].map(usize::from) {
                // A camera that sends no tables means the standard ones: 0 for luma, 1 for chroma.
                let spec = match (&self.specs[table], table) {
                    (Some(spec), _) => spec,
                    (None, 0) => &DC_LUMA,
                    (None, 1) => &DC_CHROMA,
                    (None, 4) => &AC_LUMA,
                    (None, 5) => &AC_CHROMA,
                    (None, _) => return Err(Corrupt("a Huffman table is missing")),
                };
                self.tables[table].set(spec)?;
            }
            if self.quantization[usize::from(self.components[i].quantization)].is_none() {
                return Err(Corrupt("a quantization table is missing"));
            }
        }
        match (header.u8()?, header.u8()?, header.u8()?) {
            (0, 63, 0) => Ok(()),
            _ => Err(Corrupt("its scan is not a baseline one")),
        }
    }

    /// Size the buffers for the picture.
    fn lay_out(&mut self, count: usize) {
        let (across, down) = match self.sampling {
            Sampling::Gray | Sampling::S444 => (1, 1),
            Sampling::S422 => (2, 1),
            Sampling::S420 => (2, 2),
        };
        self.mcus_across = self.width.div_ceil(8 * across);
        self.mcu_rows = self.height.div_ceil(8 * down);
        for (i, component) in self.components.iter_mut().enumerate().take(count) {
            component.blocks = if i == 0 { (across, down) } else { (1, 1) };
            (component.width, component.height) =
                if i == 0 { (self.width, self.height) } else { (self.width.div_ceil(across), self.height.div_ceil(down)) };
            component.groups = (self.mcus_across * component.blocks.0).div_ceil(GROUP);
            let groups = component.groups * component.blocks.1;
            component.coefficients.resize(groups * GROUP_LEN, 0);
            component.detailed.resize(groups, false);
            let samples = 2 * 8 * component.blocks.1 * component.stride();
            component.samples.resize(samples, 0);
        }
        if count == 3 {
            for row in &mut self.chroma {
                row.resize(2 * self.width.div_ceil(2), 0);
            }
        }
    }

    /// Copy the coded data without its byte stuffing, in pieces between restart markers, up to the end marker.
    fn unstuff(&mut self, coded: &[u8]) -> Result<(), MjpgError> {
        self.data.clear();
        // Room for as much as the raw picture has: frames differ in length, and none of them shall allocate after the first. Memory that is never
        // written to is never given.
        self.data.reserve(coded.len().max(3 * self.width * self.height) + 2 * PADDING);
        self.pieces.clear();
        let (mut at, mut start) = (0, 0);
        loop {
            const STEP: usize = 32;
            // The fast way: nothing special in the next bytes.
            while let Some(chunk) = coded.get(at..at + STEP).and_then(|chunk| chunk.first_chunk::<STEP>()) {
                if chunk.iter().fold(0, |special, &byte| special | u8::from(byte == 0xFF)) != 0 {
                    break;
                }
                self.data.extend_from_slice(chunk);
                at += STEP;
            }
            let slow_until = (at + STEP).min(coded.len());
            loop {
                let Some(&byte) = coded.get(at) else { return Err(Corrupt("no end marker, the transfer was cut short")) };
                at += 1;
                if byte != 0xFF {
                    self.data.push(byte);
                } else {
                    let mut code = 0xFF;
                    while code == 0xFF {
                        let Some(&next) = coded.get(at) else { return Err(Corrupt("no end marker, the transfer was cut short")) };
                        code = next;
                        at += 1;
                    }
                    match code {
                        0 => self.data.push(0xFF),
                        _ => {
                            self.pieces.push((start, self.data.len()));
                            self.data.extend_from_slice(&[0; PADDING]);
                            start = self.data.len();
                        }
                    }
                    match code {
                        0 => {}
                        0xD0..=0xD7 if self.restart_interval > 0 => {
                            if usize::from(code & 7) != (self.pieces.len() - 1) % 8 {
                                return Err(Corrupt("a restart marker is missing, so a part of the picture is"));
                            }
                        }
                        0xD9 => return Ok(()),
                        _ => return Err(Corrupt("there is a marker in the middle of the picture")),
                    }
                }
                if at >= slow_until {
                    break;
                }
            }
        }
    }

    fn start_piece(&mut self, piece: usize) -> Result<(), MjpgError> {
        let Some(&(start, _)) = self.pieces.get(piece) else { return Err(Corrupt("coded data is missing")) };
        self.piece = piece;
        self.state = (start, 0, 0);
        self.left_in_piece = if self.restart_interval > 0 { self.restart_interval } else { usize::MAX };
        for component in &mut self.components {
            component.last_dc = 0;
        }
        Ok(())
    }

    /// Whether the piece that was read to `position` was read to its end.
    fn check_piece(&self, position: usize) -> Result<(), MjpgError> {
        match self.pieces.get(self.piece) {
            Some(&(_, end)) if position > end => Err(Corrupt("coded data is missing")),
            Some(&(_, end)) if position + MAX_LEFT_OVER < end => Err(Corrupt("coded data is left over, so some was damaged")),
            _ => Ok(()),
        }
    }

    /// Decode the next MCU row; its pixels too, if they are wanted.
    fn decode_mcu_row(&mut self, pixels: bool) -> Result<(), MjpgError> {
        let count = if self.sampling == Sampling::Gray { 1 } else { 3 };
        for component in &mut self.components[..count] {
            component.coefficients.fill(0);
            component.detailed.fill(false);
        }
        for mcu in 0..self.mcus_across {
            if self.left_in_piece == 0 {
                let position = self.bits().position();
                self.check_piece(position)?;
                self.start_piece(self.piece + 1)?;
            }
            self.left_in_piece -= 1;
            let (at, window, count_of_bits) = self.state;
            let mut bits = Bits { data: &self.data, at, window, count: count_of_bits };
            let (tables, quantization) = (&self.tables, &self.quantization);
            let mut result = Ok(());
            for component in &mut self.components[..count] {
                let [Some(dc), Some(ac)] = [component.dc_table, component.ac_table].map(|table| tables.get(usize::from(table))) else {
                    return Err(Corrupt("a Huffman table is missing"));
                };
                let (Some(dc_spec), Some(ac_spec)) = (&dc.spec, &ac.spec) else { return Err(Corrupt("a Huffman table is missing")) };
                let Some(Some(quantization)) = quantization.get(usize::from(component.quantization)) else {
                    return Err(Corrupt("a quantization table is missing"));
                };
                let (across, down) = component.blocks;
                for v in 0..down {
                    for h in 0..across {
                        let block = mcu * across + h;
                        let group = v * component.groups + block / GROUP;
                        let Some(coefficients) = component.coefficients.as_chunks_mut::<GROUP_LEN>().0.get_mut(group) else {
                            return Err(Corrupt("more blocks than the picture has"));
                        };
                        let decoded = decode_block(
                            &mut bits,
                            (dc, dc_spec),
                            (ac, ac_spec),
                            quantization,
                            &mut component.last_dc,
                            coefficients,
                            block % GROUP * 8,
                        );
                        match decoded {
                            Ok(detailed) => component.detailed[group] |= detailed,
                            Err(error) => result = Err(error),
                        }
                    }
                }
            }
            result?;
            self.state = (bits.at, bits.window, bits.count);
        }
        let position = self.bits().position();
        let end = self.pieces.get(self.piece).map_or(0, |piece| piece.1);
        if position > end {
            return Err(Corrupt("coded data is missing"));
        }
        if pixels {
            let odd = self.decoded % 2;
            for component in &mut self.components[..count] {
                let (stride, down) = (component.stride(), component.blocks.1);
                let rows = 8 * down * stride;
                let samples = &mut component.samples[odd * rows..(odd + 1) * rows];
                for (i, (coefficients, &detailed)) in
                    component.coefficients.as_chunks::<GROUP_LEN>().0.iter().zip(&component.detailed).enumerate()
                {
                    let at = i / component.groups * 8 * stride + i % component.groups * GROUP_WIDTH;
                    if detailed {
                        idct(self.isa, coefficients, &mut samples[at..], stride);
                    } else {
                        idct_flat(std::array::from_fn(|block| coefficients[8 * block]), &mut samples[at..], stride);
                    }
                }
            }
        }
        self.decoded += 1;
        Ok(())
    }

    fn bits(&self) -> Bits<'_> {
        let (at, window, count) = self.state;
        Bits { data: &self.data, at, window, count }
    }

    /// Row `y` of the picture to planar red, green, blue, each as long as the picture is wide. Rows come in ascending order, after
    /// [`MjpgDecoder::begin`] succeeded; those left out cost no colour conversion.
    pub(super) fn row(&mut self, y: usize, red: &mut [u8], green: &mut [u8], blue: &mut [u8]) -> Result<(), MjpgError> {
        let rows_of_mcu = 8 * self.components[0].blocks.1;
        let chroma_height = self.components[1].height;
        // The two chroma rows that a 4:2:0 row lies between; the picture's edge repeats its last row.
        let (near, far) = (y / 2, if y % 2 == 1 { (y / 2 + 1).min(chroma_height.saturating_sub(1)) } else { (y / 2).saturating_sub(1) });
        let last = if self.sampling == Sampling::S420 { y.max(2 * near.max(far)) } else { y };
        while self.decoded <= last / rows_of_mcu {
            // The row of blocks before the first one wanted may have a chroma row that is.
            let wanted = self.decoded + 1 >= y / rows_of_mcu;
            self.decode_mcu_row(wanted)?;
        }
        let luma = self.components[0].row(y);
        match self.sampling {
            Sampling::Gray => {
                for plane in [red, green, blue] {
                    plane.copy_from_slice(luma);
                }
            }
            Sampling::S444 => ycc_to_planar(self.isa, luma, self.components[1].row(y), self.components[2].row(y), red, green, blue),
            Sampling::S422 | Sampling::S420 => {
                for (component, out) in self.components[1..].iter().zip(&mut self.chroma) {
                    if self.sampling == Sampling::S422 {
                        upsample_h2v1(self.isa, component.row(y), out);
                    } else {
                        upsample_h2v2(self.isa, component.row(near), component.row(far), out);
                    }
                }
                let [cb, cr] = &self.chroma;
                ycc_to_planar(self.isa, luma, cb, cr, red, green, blue);
            }
        }
        Ok(())
    }

    /// Read what is left of the picture, whose pixels nobody wants, and check that it was complete.
    pub(super) fn finish(&mut self) -> Result<(), MjpgError> {
        while self.decoded < self.mcu_rows {
            self.decode_mcu_row(false)?;
        }
        self.check_piece(self.bits().position())?;
        // A restart marker right before the end marker opens an empty piece.
        match self.pieces.get(self.piece + 1..) {
            None | Some([]) => Ok(()),
            Some([(start, end)]) if start == end => Ok(()),
            _ => Err(Corrupt("coded data is left over, so some was damaged")),
        }
    }
}

/// One block: its coefficients, dequantized, to their places. True when it has others than the first.
#[inline(always)]
fn decode_block(
    bits: &mut Bits<'_>,
    (dc, dc_spec): (&Huffman, &Spec),
    (ac, ac_spec): (&Huffman, &Spec),
    quantization: &[u16; 64],
    last_dc: &mut i32,
    coefficients: &mut [i16; GROUP_LEN],
    offset: usize,
) -> Result<bool, MjpgError> {
    bits.refill();
    let entry = bits.look(dc, dc_spec);
    if entry & Entry::VALID == 0 {
        return Err(Corrupt("a code that no Huffman table has"));
    }
    // A DC symbol is the size alone: what an AC symbol has above it must be nothing.
    if entry >> 10 & 15 != 0 {
        return Err(Corrupt("a code that no DC coefficient has"));
    }
    bits.consume(entry & 63);
    let size = entry >> 6 & 15;
    let difference = if size == 0 { (entry as i32) >> 16 } else { extend(bits.take(size), size) };
    *last_dc = last_dc.wrapping_add(difference);
    // Sixteen bits suffice for what an encoder makes; what a damaged stream makes may be anything.
    coefficients[offset] = last_dc.wrapping_mul(quantization[0].into()) as i16;
    let mut k = 1;
    while k < 64 {
        if bits.count < 32 {
            bits.refill();
        }
        let entry = bits.look(ac, ac_spec);
        if entry & (Entry::VALID | Entry::END) != Entry::VALID {
            if entry & Entry::VALID == 0 {
                return Err(Corrupt("a code that no Huffman table has"));
            }
            bits.consume(entry & 63);
            break;
        }
        bits.consume(entry & 63);
        k += (entry >> 10 & 15) as usize;
        let size = entry >> 6 & 15;
        let value = if size == 0 { (entry as i32) >> 16 } else { extend(bits.take(size), size) };
        let Some(&place) = PLACE.get(k) else { return Err(Corrupt("more coefficients than a block has")) };
        // `& (GROUP_LEN - 1)` cannot change a valid place; it spares the check. A run of sixteen zeros writes one of them.
        coefficients[(usize::from(place) + offset) & (GROUP_LEN - 1)] = value.wrapping_mul(quantization[k & 63].into()) as i16;
        k += 1;
    }
    Ok(k > 1)
}

/// A table of T.81 annex K.3.
const fn standard<const N: usize>(counts: [u8; 16], list: [u8; N]) -> Spec {
    let mut symbols = [0; 256];
    let mut i = 0;
    while i < N {
        symbols[i] = list[i];
        i += 1;
    }
    Spec { counts, symbols }
}

const DC_SYMBOLS: [u8; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
static DC_LUMA: Spec = standard([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], DC_SYMBOLS);
static DC_CHROMA: Spec = standard([0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], DC_SYMBOLS);
#[rustfmt::skip]
static AC_LUMA: Spec = standard([0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125], [
    0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71, 0x14, 0x32, 0x81, 0x91, 0xa1, 0x08,
    0x23, 0x42, 0xb1, 0xc1, 0x15, 0x52, 0xd1, 0xf0, 0x24, 0x33, 0x62, 0x72, 0x82, 0x09, 0x0a, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x25, 0x26, 0x27, 0x28,
    0x29, 0x2a, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59,
    0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89,
    0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6,
    0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe1, 0xe2,
    0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa,
]);
#[rustfmt::skip]
static AC_CHROMA: Spec = standard([0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119], [
    0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22, 0x32, 0x81, 0x08, 0x14, 0x42, 0x91,
    0xa1, 0xb1, 0xc1, 0x09, 0x23, 0x33, 0x52, 0xf0, 0x15, 0x62, 0x72, 0xd1, 0x0a, 0x16, 0x24, 0x34, 0xe1, 0x25, 0xf1, 0x17, 0x18, 0x19, 0x1a, 0x26,
    0x27, 0x28, 0x29, 0x2a, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58,
    0x59, 0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87,
    0x88, 0x89, 0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4,
    0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda,
    0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfa,
]);
