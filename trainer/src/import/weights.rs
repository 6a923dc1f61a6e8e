//! Weight files as people publish them: PyTorch `.pth` (the zip format since 1.6 and the pickle stream before it) and safetensors, told apart by content.
//!
//! Knows where numbers lie in a file and how to read them as float32; nothing of networks. Executes nothing ([`super::pickle`]), and a tensor is
//! read only when it is asked for, so a file that claims a thousand huge tensors costs nothing.

use super::pickle::{Dtype, MAX_PICKLE_BYTES, Pickle, PickleError, TensorRef};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Largest weight file read, in bytes; EfficientNet-B4's are 78 MB.
const MAX_FILE_BYTES: u64 = 1 << 30;
/// Start of a zip archive.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// Start of a stream that `torch.save` wrote before the zip format: the pickled magic number 0x1950a86a20f9469cfc6c.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
/// The only version that ever followed that magic number.
const OLD_PROTOCOL: i64 = 1001;

/// Why weights cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The file cannot be read or is none of the known formats.
    #[error("weights {path}: {why}")]
    File {
        /// File.
        path: String,
        /// Cause, and what to do.
        why: String,
    },
    /// The pickle in it is refused.
    #[error("weights {path} {source}")]
    Pickle {
        /// File.
        path: String,
        /// Cause.
        source: PickleError,
    },
    /// A tensor cannot be read.
    #[error("weights {path}: tensor {name} {why}")]
    Tensor {
        /// File.
        path: String,
        /// Tensor.
        name: String,
        /// Cause.
        why: String,
    },
}

/// Where one tensor lies.
struct Place {
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Vec<usize>,
    /// First element in `span`.
    offset: usize,
    /// The storage's bytes in the file.
    span: Range<usize>,
}

/// Shape and values (float32, row-major) of a tensor.
pub type ShapeAndValues = (Vec<usize>, Vec<f32>);

/// A weight file in memory.
pub struct WeightFile {
    path: String,
    bytes: Vec<u8>,
    places: BTreeMap<String, Place>,
    big_endian: bool,
}

impl WeightFile {
    /// Read a file and find its tensors.
    ///
    /// # Errors
    /// When it cannot be read, is in no known format, is damaged, or wants to execute something.
    pub fn open(path: &Path) -> Result<Self, WeightError> {
        let name = path.display().to_string();
        let fail = |why: String| WeightError::File { path: name.clone(), why };
        let size = std::fs::metadata(path).map_err(|e| fail(format!("cannot be read ({e}); check the path")))?.len();
        if size > MAX_FILE_BYTES {
            return Err(fail(format!("is {} MB, more than the {} MB allowed", size >> 20, MAX_FILE_BYTES >> 20)));
        }
        let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read ({e})")))?;
        Self::from_bytes(bytes, &name)
    }

    /// The same for a file that is in memory already; `path` is for messages.
    ///
    /// # Errors
    /// As [`WeightFile::open`].
    pub fn from_bytes(bytes: Vec<u8>, path: &str) -> Result<Self, WeightError> {
        let mut file = Self { path: path.to_owned(), bytes, places: BTreeMap::new(), big_endian: false };
        if file.bytes.starts_with(ZIP_MAGIC) {
            file.read_zip()?;
        } else if file.bytes.starts_with(OLD_MAGIC) {
            file.read_old()?;
        } else if file.bytes.get(8) == Some(&b'{') {
            file.read_safetensors()?;
        } else {
            return Err(file.fail("is neither a PyTorch file (.pth, .pt) nor safetensors; give the file as it was published"));
        }
        if file.places.is_empty() {
            return Err(file.fail("holds no named tensors; in Python, save `model.state_dict()`"));
        }
        file.strip_prefix("module.");
        Ok(file)
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Shape of a tensor; `None` when the file has none of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|place| place.shape.as_slice())
    }

    /// Shape and values of a tensor as float32, row-major; `None` when the file has none of that name.
    ///
    /// # Errors
    /// When its numbers do not lie within its storage.
    pub fn get(&self, name: &str) -> Result<Option<ShapeAndValues>, WeightError> {
        let Some(place) = self.places.get(name) else { return Ok(None) };
        let fail = |why: &str| WeightError::Tensor { path: self.path.clone(), name: name.to_owned(), why: why.to_owned() };
        let storage = self.bytes.get(place.span.clone()).ok_or_else(|| fail("lies outside the file"))?;
        let size = place.dtype.size();
        let elements = place.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(|| fail("is too large"))?;
        // Also keeps a tensor of stride 0 from turning one number into gigabytes.
        if elements > storage.len() / size {
            return Err(fail("has more elements than its storage"));
        }
        let mut values = Vec::with_capacity(elements);
        let mut index = vec![0usize; place.shape.len()];
        for _ in 0..elements {
            let at = index
                .iter()
                .zip(&place.strides)
                .try_fold(place.offset, |at, (i, stride)| i.checked_mul(*stride).and_then(|step| at.checked_add(step)))
                .and_then(|at| at.checked_mul(size))
                .and_then(|at| storage.get(at..at.checked_add(size)?))
                .ok_or_else(|| fail("reaches beyond its storage"))?;
            values.push(number(place.dtype, at, self.big_endian).ok_or_else(|| fail("holds a cut-off number"))?);
            for (i, size) in index.iter_mut().zip(&place.shape).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Ok(Some((place.shape.clone(), values)))
    }

    fn fail(&self, why: impl Into<String>) -> WeightError {
        WeightError::File { path: self.path.clone(), why: why.into() }
    }

    fn pickle(&self, range: Range<usize>) -> Result<Pickle, WeightError> {
        let bytes = self.bytes.get(range).unwrap_or(&[]);
        Pickle::read(bytes).map_err(|source| WeightError::Pickle { path: self.path.clone(), source })
    }

    /// `<folder>/data.pkl`, `<folder>/data/<key>`, `<folder>/byteorder`, all stored, never compressed.
    fn read_zip(&mut self) -> Result<(), WeightError> {
        let mut spans: BTreeMap<String, Range<usize>> = BTreeMap::new();
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(self.bytes.as_slice()))
            .map_err(|e| self.fail(format!("is a damaged or cut-off zip archive ({e}); download it again")))?;
        for i in 0..archive.len() {
            let entry = archive.by_index_raw(i).map_err(|e| self.fail(format!("is a damaged zip archive ({e}); download it again")))?;
            let name = entry.name().split_once('/').map_or(entry.name(), |(_, rest)| rest).to_owned();
            if entry.compression() != zip::CompressionMethod::Stored {
                return Err(self.fail(format!("holds {name} compressed, which PyTorch never does; unpack a zipped .pth first")));
            }
            let start = usize::try_from(entry.data_start()).unwrap_or(usize::MAX);
            let end = usize::try_from(entry.size()).ok().and_then(|size| start.checked_add(size));
            let Some(end) = end.filter(|end| *end <= self.bytes.len()) else {
                return Err(self.fail(format!("is cut off inside {name}; download it again")));
            };
            spans.insert(name, start..end);
        }
        let Some(program) = spans.get("data.pkl").cloned() else {
            return Err(
                self.fail("is a zip archive without data.pkl: no PyTorch weight file (a TorchScript model has to be saved as state_dict)")
            );
        };
        if program.len() > MAX_PICKLE_BYTES {
            return Err(WeightError::Pickle { path: self.path.clone(), source: PickleError::TooLong(program.len()) });
        }
        let pickle = self.pickle(program)?;
        self.big_endian = spans.get("byteorder").is_some_and(|span| self.bytes.get(span.clone()) == Some(b"big".as_slice()));
        let mut places = BTreeMap::new();
        for (name, tensor) in pickle.tensors() {
            let Some(span) = spans.get(&format!("data/{}", tensor.storage)) else {
                return Err(self.missing(name));
            };
            places.insert(name.to_owned(), place(tensor, span.clone()));
        }
        self.places = places;
        Ok(())
    }

    /// Pickles one after the other (magic number, protocol, system, object, list of storage keys), then the storages: element count (8 bytes) and data.
    fn read_old(&mut self) -> Result<(), WeightError> {
        let mut at = OLD_MAGIC.len();
        let end = self.bytes.len();
        let mut next = |file: &Self| -> Result<Pickle, WeightError> {
            let pickle = file.pickle(at..end)?;
            at += pickle.length;
            Ok(pickle)
        };
        let protocol = next(self)?.integer();
        if protocol != Some(OLD_PROTOCOL) {
            return Err(self.fail("has a format version that PyTorch never wrote; download it again"));
        }
        next(self)?;
        let pickle = next(self)?;
        let keys = next(self)?;
        let keys: Vec<String> = match keys.texts() {
            Some(texts) => texts.into_iter().map(str::to_owned).collect(),
            None => return Err(self.fail("lacks its list of storages; download it again")),
        };
        let dtypes: BTreeMap<&str, Dtype> = pickle.storages().collect();
        let mut spans: BTreeMap<String, Range<usize>> = BTreeMap::new();
        for key in keys {
            let cut = || self.fail("is cut off; download it again");
            let head = self.bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(cut)?;
            let Some(dtype) = dtypes.get(key.as_str()) else {
                return Err(self.fail("lists a storage that nothing in it uses; download it again"));
            };
            let length = usize::try_from(u64::from_le_bytes(*head)).ok().and_then(|n| n.checked_mul(dtype.size())).ok_or_else(cut)?;
            let start = at + head.len();
            at = start.checked_add(length).filter(|end| *end <= self.bytes.len()).ok_or_else(cut)?;
            spans.insert(key, start..at);
        }
        let mut places = BTreeMap::new();
        for (name, tensor) in pickle.tensors() {
            let Some(span) = spans.get(&tensor.storage) else { return Err(self.missing(name)) };
            places.insert(name.to_owned(), place(tensor, span.clone()));
        }
        self.places = places;
        Ok(())
    }

    fn read_safetensors(&mut self) -> Result<(), WeightError> {
        use safetensors::tensor::{Dtype as S, SafeTensors};
        let damaged =
            |e: safetensors::SafeTensorError| self.fail(format!("is no safetensors file, or a damaged one ({e}); download it again"));
        let (header, metadata) = SafeTensors::read_metadata(&self.bytes).map_err(damaged)?;
        // The header's own length comes first, 8 bytes.
        let data = header + 8;
        let mut places = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                S::F64 => Dtype::F64,
                S::F32 => Dtype::F32,
                S::F16 => Dtype::F16,
                S::BF16 => Dtype::BF16,
                S::I64 => Dtype::I64,
                S::I32 => Dtype::I32,
                S::I16 => Dtype::I16,
                S::I8 => Dtype::I8,
                S::U8 => Dtype::U8,
                S::BOOL => Dtype::Bool,
                // A format that no float network has; whoever asks for the tensor learns that it is not there.
                _ => continue,
            };
            let mut strides = vec![1usize; info.shape.len()];
            for i in (1..info.shape.len()).rev() {
                if let (Some(size), Some(stride)) = (info.shape.get(i).copied(), strides.get(i).copied())
                    && let Some(before) = strides.get_mut(i - 1)
                {
                    *before = stride.saturating_mul(size);
                }
            }
            let span = data + info.data_offsets.0..data + info.data_offsets.1;
            places.insert(name.clone(), Place { dtype, shape: info.shape.clone(), strides, offset: 0, span });
        }
        self.places = places;
        Ok(())
    }

    fn missing(&self, name: &str) -> WeightError {
        WeightError::Tensor { path: self.path.clone(), name: name.to_owned(), why: "has no data in the file; download it again".into() }
    }

    /// Networks that were trained on several GPUs are saved with `module.` before every name.
    fn strip_prefix(&mut self, prefix: &str) {
        if self.places.keys().all(|name| name.starts_with(prefix)) {
            self.places = std::mem::take(&mut self.places)
                .into_iter()
                .map(|(name, place)| (name.trim_start_matches(prefix).to_owned(), place))
                .collect();
        }
    }
}

fn place(tensor: &TensorRef, span: Range<usize>) -> Place {
    Place { dtype: tensor.dtype, shape: tensor.shape.clone(), strides: tensor.strides.clone(), offset: tensor.offset, span }
}

/// One number; `None` when `bytes` are too few.
fn number(dtype: Dtype, bytes: &[u8], big_endian: bool) -> Option<f32> {
    fn array<const N: usize>(bytes: &[u8], big_endian: bool) -> Option<[u8; N]> {
        let mut out: [u8; N] = bytes.try_into().ok()?;
        if big_endian {
            out.reverse();
        }
        Some(out)
    }
    Some(match dtype {
        Dtype::F64 => f64::from_le_bytes(array(bytes, big_endian)?) as f32,
        Dtype::F32 => f32::from_le_bytes(array(bytes, big_endian)?),
        Dtype::F16 => f16::from_le_bytes(array(bytes, big_endian)?).to_f32(),
        Dtype::BF16 => bf16::from_le_bytes(array(bytes, big_endian)?).to_f32(),
        Dtype::I64 => i64::from_le_bytes(array(bytes, big_endian)?) as f32,
        Dtype::I32 => i32::from_le_bytes(array(bytes, big_endian)?) as f32,
        Dtype::I16 => i16::from_le_bytes(array(bytes, big_endian)?).into(),
        Dtype::I8 => i8::from_le_bytes(array(bytes, big_endian)?).into(),
        Dtype::U8 | Dtype::Bool => (*bytes.first()?).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// The pickle of `{'a': tensor of [2, 3], 'h': [2, 2] transposed half}` as `torch.save` writes it.
    fn program(storage_of_a: &str, storage_of_h: &str) -> Vec<u8> {
        let mut out = b"\x80\x02}(".to_vec();
        for (name, class, key, len, shape, strides) in
            [("a", "FloatStorage", storage_of_a, 6u8, [2u8, 3], [3u8, 1]), ("h", "HalfStorage", storage_of_h, 4, [2, 2], [1, 2])]
        {
            let text = |out: &mut Vec<u8>, t: &str| {
                out.push(b'X');
                out.extend_from_slice(&(t.len() as u32).to_le_bytes());
                out.extend_from_slice(t.as_bytes());
            };
            text(&mut out, name);
            out.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            text(&mut out, "storage");
            out.extend_from_slice(format!("ctorch\n{class}\n").as_bytes());
            text(&mut out, key);
            text(&mut out, "cpu");
            out.extend_from_slice(&[b'K', len, b't', b'Q', b'K', 0]);
            out.extend_from_slice(&[b'K', shape[0], b'K', shape[1], 0x86, b'K', strides[0], b'K', strides[1], 0x86, 0x89]);
            out.extend_from_slice(b"ccollections\nOrderedDict\n)RtR");
        }
        out.extend_from_slice(b"u.");
        out
    }

    fn floats() -> Vec<u8> {
        [1f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn halves() -> Vec<u8> {
        [0.5f32, 1.5, 2.5, 3.5].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
    }

    fn zip_file() -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let stored = zip::write::FileOptions::default().compression_method(zip::CompressionMethod::Stored);
        for (name, data) in [("archive/data.pkl", program("0", "1")), ("archive/data/0", floats()), ("archive/data/1", halves())] {
            writer.start_file(name, stored).unwrap();
            writer.write_all(&data).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn old_file() -> Vec<u8> {
        let mut out = OLD_MAGIC.to_vec();
        out.extend_from_slice(b"\x80\x02M\xe9\x03.");
        out.extend_from_slice(b"\x80\x02}.");
        out.extend_from_slice(&program("94802160996352", "7"));
        out.extend_from_slice(b"\x80\x02](X\x01\x00\x00\x007X\x0e\x00\x00\x0094802160996352e.");
        out.extend_from_slice(&4u64.to_le_bytes());
        out.extend_from_slice(&halves());
        out.extend_from_slice(&6u64.to_le_bytes());
        out.extend_from_slice(&floats());
        out
    }

    fn safetensors_file() -> Vec<u8> {
        use safetensors::tensor::{Dtype as S, TensorView};
        let (a, h) = (floats(), halves());
        let views = [("a", TensorView::new(S::F32, vec![2, 3], &a).unwrap()), ("h", TensorView::new(S::F16, vec![2, 2], &h).unwrap())];
        safetensors::serialize(views, None).unwrap()
    }

    #[test]
    fn all_three_formats_give_the_same_numbers() {
        for (bytes, h) in
            [(zip_file(), [0.5, 2.5, 1.5, 3.5]), (old_file(), [0.5, 2.5, 1.5, 3.5]), (safetensors_file(), [0.5, 1.5, 2.5, 3.5])]
        {
            let file = WeightFile::from_bytes(bytes, "made up").unwrap();
            assert_eq!(file.names().collect::<Vec<_>>(), ["a", "h"]);
            assert_eq!(file.get("a").unwrap(), Some((vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])));
            // Strides of a transposed tensor are followed; safetensors has none.
            assert_eq!(file.get("h").unwrap(), Some((vec![2, 2], h.to_vec())));
            assert!(file.get("b").unwrap().is_none());
        }
    }

    #[test]
    fn what_is_no_weight_file_is_said() {
        let message = |bytes: &[u8]| WeightFile::from_bytes(bytes.to_vec(), "F").err().unwrap().to_string();
        assert!(message(b"hello, world").contains("neither"), "{}", message(b"hello, world"));
        assert!(message(b"").contains("neither"));
        // An attack in the old format is named, not run.
        let mut attack = OLD_MAGIC.to_vec();
        attack.extend_from_slice(b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.");
        assert!(message(&attack).contains("wants Python to load os.system"), "{}", message(&attack));
        // Compressed by somebody who meant well.
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        writer.start_file("x.pth", zip::write::FileOptions::default().compression_method(zip::CompressionMethod::Stored)).unwrap();
        assert!(message(&writer.finish().unwrap().into_inner()).contains("without data.pkl"));
    }

    #[test]
    fn a_tensor_that_lies_about_its_size_costs_nothing() {
        // Shape [2, 3] becomes [200, 3] in a storage of 6.
        let mut bytes = old_file();
        let at = bytes.windows(4).position(|w| w == [b'K', 2, b'K', 3]).unwrap();
        bytes[at + 1] = 200;
        let file = WeightFile::from_bytes(bytes, "F").unwrap();
        assert!(file.get("a").unwrap_err().to_string().contains("more elements than its storage"));
        // Strides that reach beyond it.
        let mut bytes = old_file();
        let at = bytes.windows(4).position(|w| w == [b'K', 3, b'K', 1]).unwrap();
        bytes[at + 1] = 255;
        let file = WeightFile::from_bytes(bytes, "F").unwrap();
        assert!(file.get("a").unwrap_err().to_string().contains("beyond its storage"));
    }

    fn read_all(bytes: Vec<u8>) {
        if let Ok(file) = WeightFile::from_bytes(bytes, "F") {
            for name in file.names() {
                let _ = file.get(name).map(|t| t.map(|(_, values)| values.len()));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn damaged_files_never_panic(which in 0..3usize, at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<prop::sample::Index>(), is_cut in any::<bool>()) {
            let mut bytes = [zip_file, old_file, safetensors_file][which]();
            let i = at.index(bytes.len());
            bytes[i] = to;
            if is_cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            read_all(bytes);
        }

        #[test]
        fn noise_behind_every_magic_never_panics(which in 0..3usize, noise in prop::collection::vec(any::<u8>(), 0..400)) {
            let magic: &[u8] = [ZIP_MAGIC, OLD_MAGIC, b"\x20\0\0\0\0\0\0\0{"][which];
            read_all([magic, &noise].concat());
        }
    }
}
