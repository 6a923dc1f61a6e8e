//! Picture folders: finding the pictures, their product, split, defect and mask; reading one picture as a [`Frame`].
//!
//! Knows file names and picture files; nothing of models, scores or the live line. It only reads.
//!
//! Layouts, told apart by what is there:
//! - MVTec-AD (Bergmann et al., CVPR 2019): `train/good`, `test/good`, `test/<defect>`, `ground_truth/<defect>/<name>_mask.png`; one
//!   such folder, or a folder of them (one per category);
//! - one folder of normal pictures per product;
//! - one mixed folder of normal pictures.

use crate::frame::{Frame, Origin, PixelFormat, Truth, now_ns};
use crate::pool::Pooled;
use crate::preprocess::{MAX_FRAME_AREA_PX, MAX_FRAME_SIDE_PX, decode_rgb};
use std::cmp::Ordering;
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest picture file read, in bytes: [`MAX_FRAME_AREA_PX`] pixels of incompressible RGB. Larger ones are a mistake or an attack.
pub const MAX_FILE_BYTES: u64 = 3 * MAX_FRAME_AREA_PX;
/// File name endings that count as pictures (any case): what the `image` crate is built to read.
pub const PICTURE_EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];
/// Folder name of parts without a defect.
pub const GOOD: &str = "good";

/// Which half of a data set a picture belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Normal pictures to learn from.
    Train,
    /// Pictures to measure with.
    Test,
}

/// How a folder is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One MVTec-AD category.
    Category,
    /// A folder of MVTec-AD categories.
    Categories,
    /// One folder of normal pictures per product.
    Products,
    /// Normal pictures of any products in one folder.
    Mixed,
}

/// One picture of a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Category (product): the name of its folder.
    pub category: String,
    /// The picture file.
    pub path: PathBuf,
    /// Train or test; always train in layouts without the two.
    pub split: Split,
    /// Name of the defect, `None` for a good part.
    pub defect: Option<String>,
    /// The mask file of a defective part, where there is one.
    pub mask: Option<PathBuf>,
}

/// The pictures of a folder, in natural order of category, split, defect (good first) and file name.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// How the folder is laid out.
    pub layout: Layout,
    /// Every picture.
    pub items: Vec<Item>,
}

/// Why a folder or a picture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A folder or file cannot be read.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// Folder or file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// No picture was found.
    #[error(
        "{path} holds no pictures (png, jpg): give a folder in MVTec-AD layout (train/good, test/<defect>), one folder per product, or one mixed folder"
    )]
    Empty {
        /// Folder.
        path: PathBuf,
    },
    /// Pictures where the MVTec-AD layout has folders.
    #[error("{path} lies directly in {split}/: move it to {split}/good or, when it shows a defect, to test/<defect>")]
    Misplaced {
        /// The first such picture.
        path: PathBuf,
        /// `train` or `test`.
        split: &'static str,
    },
    /// A file that cannot be decoded.
    #[error("{path} is not a picture that can be read: {why}; replace or remove it")]
    Picture {
        /// File.
        path: PathBuf,
        /// Cause.
        why: String,
    },
}

impl Dataset {
    /// Find the pictures of `dir`. Links are followed; hidden files and files of other types are passed over. Pictures are not opened: a
    /// bad one shows when it is loaded.
    ///
    /// # Errors
    /// When a folder cannot be read, nothing is found, or pictures lie where the layout has folders.
    pub fn scan(dir: &Path) -> Result<Self, DatasetError> {
        let mut items = Vec::new();
        if is_category(dir) {
            scan_category(dir, &mut items)?;
            return Self::found(dir, Layout::Category, items);
        }
        let listing = list(dir)?;
        let categories: Vec<&PathBuf> = listing.iter().filter(|path| is_category(path)).collect();
        if !categories.is_empty() {
            for category in categories {
                scan_category(category, &mut items)?;
            }
            return Self::found(dir, Layout::Categories, items);
        }
        let normal = |category: &Path, path: &Path| Item {
            category: name_of(category),
            path: path.to_path_buf(),
            split: Split::Train,
            defect: None,
            mask: None,
        };
        let mut layout = Layout::Mixed;
        for path in &listing {
            if path.is_dir() {
                for picture in list(path)?.iter().filter(|path| is_picture(path)) {
                    layout = Layout::Products;
                    items.push(normal(path, picture));
                }
            } else if is_picture(path) {
                items.push(normal(dir, path));
            }
        }
        Self::found(dir, layout, items)
    }

    fn found(dir: &Path, layout: Layout, items: Vec<Item>) -> Result<Self, DatasetError> {
        if items.is_empty() { Err(DatasetError::Empty { path: dir.to_path_buf() }) } else { Ok(Self { layout, items }) }
    }

    /// The categories' names, each once, in order.
    pub fn categories(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.items.iter().map(|item| item.category.as_str()).collect();
        names.dedup();
        names
    }
}

/// Whether `dir` is an MVTec-AD category: it has a `train` or `test` folder.
fn is_category(dir: &Path) -> bool {
    dir.join("train").is_dir() || dir.join("test").is_dir()
}

fn scan_category(dir: &Path, items: &mut Vec<Item>) -> Result<(), DatasetError> {
    let category = name_of(dir);
    for (split, split_name) in [(Split::Train, "train"), (Split::Test, "test")] {
        let folder = dir.join(split_name);
        if !folder.is_dir() {
            continue;
        }
        let listing = list(&folder)?;
        if let Some(path) = listing.iter().find(|path| is_picture(path)) {
            return Err(DatasetError::Misplaced { path: path.clone(), split: split_name });
        }
        let mut kinds: Vec<&PathBuf> = listing.iter().filter(|path| path.is_dir()).collect();
        // Good first; the sort is stable, so defects keep their natural order.
        kinds.sort_by_key(|path| name_of(path) != GOOD);
        for kind in kinds {
            let name = name_of(kind);
            let defect = (name != GOOD).then_some(name);
            for path in list(kind)?.into_iter().filter(|path| is_picture(path)) {
                let mask = defect.as_deref().and_then(|defect| mask_of(dir, defect, &path));
                items.push(Item { category: category.clone(), path, split, defect: defect.clone(), mask });
            }
        }
    }
    Ok(())
}

/// The mask of a test picture: `<name>_mask.png` as in MVTec-AD, or `<name>.png` as in sets derived from it.
fn mask_of(category: &Path, defect: &str, picture: &Path) -> Option<PathBuf> {
    let folder = category.join("ground_truth").join(defect);
    let stem = picture.file_stem()?.to_string_lossy();
    [format!("{stem}_mask.png"), format!("{stem}.png")].into_iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

/// The name of a folder, also for paths like `.` or `a/..`.
fn name_of(path: &Path) -> String {
    let named = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    named(path).or_else(|| fs::canonicalize(path).ok().and_then(|path| named(&path))).unwrap_or_else(|| "parts".into())
}

/// Whether a path's name is that of a picture. The file itself is not looked at: a dangling link counts, and fails with its name on loading.
pub fn is_picture(path: &Path) -> bool {
    let extension = path.extension().is_some_and(|e| PICTURE_EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)));
    extension && !path.is_dir()
}

/// Everything in a folder but hidden files, in natural order of names.
///
/// # Errors
/// When the folder or an entry cannot be read.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let failed = |source| DatasetError::Read { path: dir.to_path_buf(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort_by(|a, b| natural_order(&name_of(a), &name_of(b)));
    Ok(paths)
}

/// Orders names as people do: runs of digits by their number (`2.png` before `10.png`), the rest by character; ties by plain order.
pub fn natural_order(a: &str, b: &str) -> Ordering {
    let (mut rest_a, mut rest_b) = (a, b);
    loop {
        let (digits_a, tail_a) = split_digits(rest_a);
        let (digits_b, tail_b) = split_digits(rest_b);
        let order = match (digits_a.is_empty(), digits_b.is_empty()) {
            (false, false) => {
                // Without leading zeros the longer number is the larger one; no number is too long for this.
                let (number_a, number_b) = (digits_a.trim_start_matches('0'), digits_b.trim_start_matches('0'));
                (rest_a, rest_b) = (tail_a, tail_b);
                number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b))
            }
            _ => {
                let (mut chars_a, mut chars_b) = (rest_a.chars(), rest_b.chars());
                let (next_a, next_b) = (chars_a.next(), chars_b.next());
                if next_a.is_none() && next_b.is_none() {
                    return a.cmp(b);
                }
                (rest_a, rest_b) = (chars_a.as_str(), chars_b.as_str());
                next_a.cmp(&next_b)
            }
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// What [`read_picture`] put in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picture {
    /// [`PixelFormat::Mjpg`] for a JPEG file, else [`PixelFormat::Gray8`] or [`PixelFormat::Rgb8`].
    pub format: PixelFormat,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
}

/// Read a picture file into `pixels` (its content is replaced). A JPEG stays as it is, to be decoded by [`crate::preprocess`] like a
/// camera's frame, so that training, evaluation and the live line see the same pixels; a PNG is decoded: grey to one byte a pixel, all
/// else to RGB, 16 bits to 8, transparency dropped.
///
/// # Errors
/// When the file cannot be read, is too large, or is no PNG or JPEG (what the file holds counts, not its name).
pub fn read_picture(path: &Path, pixels: &mut Vec<u8>) -> Result<Picture, DatasetError> {
    let unreadable = |source| DatasetError::Read { path: path.to_path_buf(), source };
    // Decoders' messages may run over several lines; ours is one sentence.
    let bad = |why: String| DatasetError::Picture { path: path.to_path_buf(), why: why.split_whitespace().collect::<Vec<_>>().join(" ") };
    let file = File::open(path).map_err(unreadable)?;
    pixels.clear();
    file.take(MAX_FILE_BYTES + 1).read_to_end(pixels).map_err(unreadable)?;
    if pixels.len() as u64 > MAX_FILE_BYTES {
        return Err(bad(format!("it is larger than {} MB", MAX_FILE_BYTES >> 20)));
    }
    if pixels.is_empty() {
        return Err(bad("it is empty".into()));
    }
    let format = image::guess_format(pixels).map_err(|_| bad("it is neither PNG nor JPEG".into()))?;
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_FRAME_SIDE_PX);
    limits.max_image_height = Some(MAX_FRAME_SIDE_PX);
    // Eight bytes for 16-bit RGBA.
    limits.max_alloc = Some(8 * MAX_FRAME_AREA_PX);
    let mut reader = image::ImageReader::with_format(Cursor::new(pixels.as_slice()), format);
    reader.limits(limits);
    if format == image::ImageFormat::Jpeg {
        let (width_px, height_px) = reader.into_dimensions().map_err(|error| bad(error.to_string()))?;
        return Ok(Picture { format: PixelFormat::Mjpg, width_px, height_px });
    }
    let decoded = reader.decode().map_err(|error| bad(error.to_string()))?;
    let (width_px, height_px) = (decoded.width(), decoded.height());
    let gray = !decoded.color().has_color();
    let (format, bytes) =
        if gray { (PixelFormat::Gray8, decoded.into_luma8().into_raw()) } else { (PixelFormat::Rgb8, decoded.into_rgb8().into_raw()) };
    pixels.clear();
    pixels.extend_from_slice(&bytes);
    Ok(Picture { format, width_px, height_px })
}

/// A picture file as a frame, [`PixelFormat::Rgb8`] or [`PixelFormat::Gray8`], without product or truth. For tools, not for the hot path.
///
/// # Errors
/// When the file cannot be read or decoded.
pub fn load_frame(path: &Path) -> Result<Frame, DatasetError> {
    let mut pixels = Vec::new();
    let Picture { format, width_px, height_px } = read_picture(path, &mut pixels)?;
    let origin = Origin { path: Some(Arc::from(path)), ..Origin::default() };
    let mut frame =
        Frame { pixels: Pooled::detached(pixels), format, width_px, height_px, captured_ns: now_ns(), seq: 0, part: None, origin };
    if format == PixelFormat::Mjpg {
        let mut rgb = Vec::new();
        decode_rgb(&frame, &mut rgb).map_err(|error| DatasetError::Picture { path: path.to_path_buf(), why: error.to_string() })?;
        frame.pixels = Pooled::detached(rgb);
        frame.format = PixelFormat::Rgb8;
    }
    Ok(frame)
}

/// A mask file as one byte a pixel, row-major, 255 where its grey value is above 127, else 0; with width and height.
///
/// # Errors
/// When the file cannot be read or decoded.
pub fn load_mask(path: &Path) -> Result<(Vec<u8>, u32, u32), DatasetError> {
    let frame = load_frame(path)?;
    let channels = if frame.format == PixelFormat::Gray8 { 1 } else { 3 };
    let mask = frame.pixels.chunks_exact(channels).map(|px| if px.iter().any(|&value| value > 127) { 255 } else { 0 }).collect();
    Ok((mask, frame.width_px, frame.height_px))
}

/// Product and truth of a picture from its place in an MVTec-AD layout: `<product>/test/<defect>/<file>` or
/// `<product>/train/good/<file>`. `None` elsewhere. For a path that may be relative, give it in full.
pub fn labels_from_path(path: &Path) -> Option<(String, Truth)> {
    let mut folders = path.parent()?.components().rev().map(|c| c.as_os_str().to_string_lossy());
    let kind = folders.next()?;
    let split = folders.next()?;
    let product = folders.next()?;
    if split != "train" && split != "test" {
        return None;
    }
    let defect = (kind != GOOD).then(|| Arc::from(&*kind));
    Some((product.into_owned(), Truth { defect }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, ImageBuffer, Luma, Rgb, RgbImage, Rgba};

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"").unwrap();
    }

    fn summary(set: &Dataset) -> Vec<String> {
        let file = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        set.items
            .iter()
            .map(|i| format!("{} {:?} {} {} {}", i.category, i.split, i.defect.as_deref().unwrap_or("-"), file(&i.path), i.mask.is_some()))
            .collect()
    }

    #[test]
    fn numbers_sort_by_value() {
        let mut names = ["b", "10.png", "2.png", "a10b2", "a9b10", "a", "010.png", "99999999999999999999999.png", ""];
        names.sort_by(|a, b| natural_order(a, b));
        assert_eq!(names, ["", "2.png", "010.png", "10.png", "99999999999999999999999.png", "a", "a9b10", "a10b2", "b"]);
    }

    proptest::proptest! {
        /// Sorting panics on an order that is not total; names come from outside.
        #[test]
        fn natural_order_is_a_total_order(a in "[a0-9é]{0,6}", b in "[a0-9é]{0,6}", c in "[a0-9é]{0,6}") {
            use proptest::prelude::*;
            prop_assert_eq!(natural_order(&a, &b), natural_order(&b, &a).reverse());
            prop_assert_eq!(natural_order(&a, &b) == Ordering::Equal, a == b);
            if natural_order(&a, &b).is_le() && natural_order(&b, &c).is_le() {
                prop_assert!(natural_order(&a, &c).is_le());
            }
        }
    }

    #[test]
    fn a_category_and_a_folder_of_categories() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("nut");
        for file in ["train/good/10.png", "train/good/2.JPG", "test/cut/0.png", "test/cut/1.png", "test/good/0.png", "test/apart/0.jpeg"] {
            touch(&root.join(file));
        }
        for file in
            ["train/good/.hidden.png", "train/good/notes.txt", "ground_truth/cut/0_mask.png", "ground_truth/apart/0.png", "test/info.txt"]
        {
            touch(&root.join(file));
        }
        let want = [
            "nut Train - 2.JPG false",
            "nut Train - 10.png false",
            "nut Test - 0.png false",
            "nut Test apart 0.jpeg true",
            "nut Test cut 0.png true",
            "nut Test cut 1.png false",
        ];
        let set = Dataset::scan(&root).unwrap();
        assert_eq!((set.layout, summary(&set)), (Layout::Category, want.map(String::from).to_vec()));
        touch(&dir.path().join("bolt/test/good/0.png"));
        let set = Dataset::scan(dir.path()).unwrap();
        assert_eq!((set.layout, set.categories()), (Layout::Categories, vec!["bolt", "nut"]));
        assert_eq!(set.items.len(), 7);
    }

    #[test]
    fn folders_per_product_and_one_mixed_folder() {
        let dir = tempfile::tempdir().unwrap();
        touch(&dir.path().join("a/1.png"));
        touch(&dir.path().join("b/1.png"));
        let set = Dataset::scan(dir.path()).unwrap();
        assert_eq!((set.layout, set.categories()), (Layout::Products, vec!["a", "b"]));
        assert!(set.items.iter().all(|i| i.split == Split::Train && i.defect.is_none()));
        let set = Dataset::scan(&dir.path().join("a")).unwrap();
        assert_eq!((set.layout, set.categories()), (Layout::Mixed, vec!["a"]));
    }

    #[test]
    fn errors_name_the_file_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let message = |path: &Path| Dataset::scan(path).map(|_| ()).unwrap_err().to_string();
        assert!(message(&dir.path().join("missing")).contains("missing"));
        assert!(message(dir.path()).contains("holds no pictures"));
        touch(&dir.path().join("nut/test/7.png"));
        let text = message(&dir.path().join("nut"));
        assert!(text.contains("7.png") && text.contains("test/good"), "{text}");
        let bad = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            let text = load_frame(&path).map(|_| ()).unwrap_err().to_string();
            assert!(text.contains(name) && !text.contains('\n'), "{text}");
            text
        };
        assert!(bad("empty.png", b"").contains("empty"));
        assert!(bad("text.jpg", b"no picture at all").contains("neither"));
        bad("cut.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR");
        bad("cut.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF");
        #[cfg(unix)]
        {
            let link = dir.path().join("dangling.png");
            std::os::unix::fs::symlink(dir.path().join("gone.png"), &link).unwrap();
            assert!(load_frame(&link).map(|_| ()).unwrap_err().to_string().contains("dangling.png"));
        }
    }

    #[test]
    fn pictures_of_every_kind_become_frames() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let gray: GrayImage = ImageBuffer::from_fn(6, 4, |x, y| Luma([(x * 40 + y) as u8]));
        gray.save(path("gray.png")).unwrap();
        let rgb: RgbImage = ImageBuffer::from_fn(6, 4, |x, y| Rgb([x as u8, y as u8, 9]));
        rgb.save(path("rgb.png")).unwrap();
        let clear: image::RgbaImage = ImageBuffer::from_pixel(6, 4, Rgba([1, 2, 3, 128]));
        clear.save(path("rgba.png")).unwrap();
        let deep: ImageBuffer<Luma<u16>, Vec<u16>> = ImageBuffer::from_pixel(6, 4, Luma([0x8000]));
        deep.save(path("deep.png")).unwrap();
        RgbImage::from_pixel(16, 8, Rgb([200, 100, 50])).save(path("photo.jpg")).unwrap();

        let frame = load_frame(&path("gray.png")).unwrap();
        assert_eq!((frame.format, frame.width_px, frame.height_px, frame.pixels.len()), (PixelFormat::Gray8, 6, 4, 24));
        assert_eq!(frame.pixels.as_slice(), gray.as_raw().as_slice());
        let frame = load_frame(&path("rgb.png")).unwrap();
        assert_eq!((frame.format, frame.pixels.as_slice()), (PixelFormat::Rgb8, rgb.as_raw().as_slice()));
        assert_eq!(load_frame(&path("rgba.png")).unwrap().pixels.get(..3), Some(&[1, 2, 3][..]));
        assert_eq!(load_frame(&path("deep.png")).unwrap().pixels.first(), Some(&128));
        let frame = load_frame(&path("photo.jpg")).unwrap();
        assert_eq!((frame.format, frame.pixels.len()), (PixelFormat::Rgb8, 16 * 8 * 3));
        assert!(frame.pixels.first().is_some_and(|&r| (195..=205).contains(&r)));
        let mut raw = Vec::new();
        let picture = read_picture(&path("photo.jpg"), &mut raw).unwrap();
        assert_eq!((picture.format, picture.width_px, picture.height_px), (PixelFormat::Mjpg, 16, 8));
        assert_eq!(raw, fs::read(path("photo.jpg")).unwrap());
        let (mask, w, h) = load_mask(&path("gray.png")).unwrap();
        assert_eq!((mask.first(), mask.get(5), w, h), (Some(&0), Some(&255), 6, 4));
    }

    #[test]
    fn labels_come_from_the_last_three_folders() {
        let labels = |path: &str| labels_from_path(Path::new(path)).map(|(product, truth)| (product, truth.defect.map(|d| d.to_string())));
        assert_eq!(labels("/data/nut/test/cut/1.png"), Some(("nut".into(), Some("cut".into()))));
        assert_eq!(labels("/data/nut/train/good/1.png"), Some(("nut".into(), None)));
        assert_eq!(labels("/data/nut/1.png"), None);
    }

    /// The industrial sets beside the repository, where there are any.
    #[test]
    fn shared_data_scans_completely() {
        let shared = std::env::var_os("CULL_SHARED").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
        let root = shared.join("data/industrial");
        if !root.is_dir() {
            eprintln!("SKIPPED: no {}", root.display());
            return;
        }
        let set = Dataset::scan(&root).unwrap();
        assert!(set.categories().len() >= 2 && set.layout == Layout::Categories);
        for split in [Split::Train, Split::Test] {
            assert!(set.items.iter().any(|i| i.split == split));
        }
        let masked = set.items.iter().find(|i| i.mask.is_some()).unwrap();
        let frame = load_frame(&masked.path).unwrap();
        let (_, w, h) = load_mask(masked.mask.as_deref().unwrap()).unwrap();
        assert_eq!((w, h), (frame.width_px, frame.height_px));
    }
}
