//! What a training folder holds: MVTec-AD layout, one folder per product, or one mixed folder. Knows file names only, never pixels.

use cull::dataset::{Dataset, Layout, Split};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Fewer normal images than this cannot train and calibrate anything.
pub const MIN_IMAGES: usize = 20;
/// Of the normal images of a product, one in this many is kept out of training for the calibration.
const HELD_OUT_ONE_IN: usize = 7;
/// Held-out images wanted of a small product: fewer cannot be calibrated.
const HELD_OUT_AT_LEAST: usize = 5;

/// With fewer pictures of a product than this its normal variation is hardly known, and good parts of it will be rejected.
const THIN_PRODUCT: usize = 10;
/// Folder names that no product has: in the layout of one folder per product they show that defective parts lie among the normal ones.
const DEFECT_FOLDERS: [&str; 16] = [
    "bad",
    "defect",
    "defects",
    "defective",
    "defectives",
    "ng",
    "nok",
    "not_good",
    "notgood",
    "reject",
    "rejects",
    "rejected",
    "scrap",
    "faulty",
    "anomaly",
    "anomalous",
];

/// Images of a training folder.
#[derive(Clone, Debug, Default)]
pub struct TrainingSet {
    /// Normal images to train on.
    pub train: Vec<PathBuf>,
    /// Normal images kept out, for the calibration.
    pub held_out: Vec<PathBuf>,
    /// Test images with their category and defect (`None` for good), where the folder has them.
    pub test: Vec<TestImage>,
    /// Product names found; `trained_on` in the bundle. Never used in training.
    pub products: Vec<String>,
    /// Products with so few normal images that their good parts will be rejected, and how many they have.
    pub thin: Vec<(String, usize)>,
}

/// One labelled image.
#[derive(Clone, Debug)]
pub struct TestImage {
    /// File.
    pub path: PathBuf,
    /// Category (product).
    pub category: String,
    /// Defect, `None` for a good part.
    pub defect: Option<String>,
    /// Mask file.
    pub mask: Option<PathBuf>,
}

/// Why a folder cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The folder cannot be read or has no pictures.
    #[error("{0}")]
    Folder(String),
    /// Too few.
    #[error("{path} holds {found} normal images, at least {MIN_IMAGES} are needed: collect more good parts (`cull collect`)")]
    TooFew {
        /// Folder.
        path: String,
        /// Normal images found.
        found: usize,
    },
    /// Test defects among the training images.
    #[error("{image} is in the training set and, with the same content, in the test set at {test}: take it out of one of them")]
    MixedUp {
        /// Training image.
        image: String,
        /// Test image.
        test: String,
    },
    /// A folder of defects among the products.
    #[error(
        "{folder} looks like a folder of defective parts, and only normal ones may be trained on: move it elsewhere, or lay the folder out as \
         <product>/train/good, <product>/test/good and <product>/test/{name} to measure with it"
    )]
    DefectFolder {
        /// Folder.
        folder: String,
        /// Its name.
        name: String,
    },
    /// A folder that looks like defects in train.
    #[error("{0} lies under train/ but is not called good: only normal parts may be trained on; move it to test/")]
    DefectInTrain(String),
}

impl TrainingSet {
    /// Find the images of `dir`. Which images are held out depends on their order alone, so it is the same on every machine.
    ///
    /// # Errors
    /// When the folder has no pictures, too few, or defects in train.
    pub fn scan(dir: &Path) -> Result<Self, DataError> {
        let mut by_product: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        let mut test = Vec::new();
        let found = Dataset::scan(dir).map_err(|e| DataError::Folder(e.to_string()))?;
        if found.layout == Layout::Products
            && let Some(name) = found.categories().into_iter().find(|name| DEFECT_FOLDERS.contains(&name.to_lowercase().as_str()))
        {
            return Err(DataError::DefectFolder { folder: dir.join(name).display().to_string(), name: name.to_owned() });
        }
        for item in found.items {
            match (item.split, &item.defect) {
                (Split::Train, None) => by_product.entry(item.category).or_default().push(item.path),
                (Split::Train, Some(_)) => return Err(DataError::DefectInTrain(item.path.display().to_string())),
                (Split::Test, _) => {
                    test.push(TestImage { path: item.path, category: item.category, defect: item.defect, mask: item.mask });
                }
            }
        }
        let mut out = Self { test, products: by_product.keys().cloned().collect(), ..Self::default() };
        for (product, pictures) in by_product {
            if pictures.len() < THIN_PRODUCT {
                out.thin.push((product, pictures.len()));
            }
            // Every k-th image, so that a drift over the shift is in both parts.
            let every = (pictures.len() / HELD_OUT_AT_LEAST).clamp(2, HELD_OUT_ONE_IN);
            for (i, path) in pictures.into_iter().enumerate() {
                if i % every == every / 2 { out.held_out.push(path) } else { out.train.push(path) }
            }
        }
        let found = out.train.len() + out.held_out.len();
        if found < MIN_IMAGES {
            return Err(DataError::TooFew { path: dir.display().to_string(), found });
        }
        Ok(out)
    }

    /// Refuse a set whose training images are also test defects, byte for byte.
    ///
    /// # Errors
    /// [`DataError::MixedUp`] naming the first pair.
    pub fn check_not_mixed_up(&self) -> Result<(), DataError> {
        use sha2::{Digest, Sha256};
        let digest = |path: &Path| std::fs::read(path).ok().map(Sha256::digest);
        // Unreadable files are found, named and counted by the feature extraction.
        let defects: BTreeMap<_, &TestImage> =
            self.test.iter().filter(|t| t.defect.is_some()).filter_map(|t| Some((digest(&t.path)?, t))).collect();
        if defects.is_empty() {
            return Ok(());
        }
        for path in self.train.iter().chain(&self.held_out) {
            if let Some(test) = digest(path).and_then(|d| defects.get(&d)) {
                return Err(DataError::MixedUp { image: path.display().to_string(), test: test.path.display().to_string() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, usize)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, count) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            for i in 0..*count {
                // Scanning does not open pictures.
                std::fs::write(path.join(format!("{i}.png")), format!("{} {i}", path.display())).unwrap();
            }
        }
        dir
    }

    #[test]
    fn all_three_layouts_are_found_and_split_the_same_way_every_time() {
        let mvtec = folder(&[("a/train/good", 30), ("b/train/good", 12), ("a/test/good", 3), ("a/test/scratch", 4)]);
        let set = TrainingSet::scan(mvtec.path()).unwrap();
        assert_eq!((set.train.len() + set.held_out.len(), set.test.len()), (42, 7));
        assert_eq!(set.products, ["a", "b"]);
        assert!(set.thin.is_empty());
        let again = TrainingSet::scan(mvtec.path()).unwrap();
        assert_eq!((set.train, set.held_out), (again.train, again.held_out));
        let products = TrainingSet::scan(folder(&[("cookie", 20), ("nut", 7)]).path()).unwrap();
        assert_eq!(products.products, ["cookie", "nut"]);
        assert_eq!(products.thin, [("nut".to_owned(), 7)]);
        let mixed = TrainingSet::scan(folder(&[(".", 25)]).path()).unwrap();
        assert_eq!((mixed.train.len() + mixed.held_out.len(), mixed.products.len()), (25, 1));
        assert!(mixed.held_out.len() >= 5);
    }

    #[test]
    fn sets_that_cannot_work_are_refused_and_the_reason_named() {
        let message = |files: &[(&str, usize)]| TrainingSet::scan(folder(files).path()).unwrap_err().to_string();
        assert!(message(&[("a", 19)]).contains("19 normal images, at least 20"));
        assert!(message(&[("a/train/good", 30), ("a/train/scratch", 1)]).contains("not called good"));
        assert!(message(&[("good", 30), ("NG", 3)]).contains("folder of defective parts"));
    }

    #[test]
    fn a_test_defect_in_the_training_set_is_refused() {
        let dir = folder(&[("a/train/good", 30), ("a/test/scratch", 4)]);
        let set = TrainingSet::scan(dir.path()).unwrap();
        set.check_not_mixed_up().unwrap();
        std::fs::copy(dir.path().join("a/test/scratch/2.png"), dir.path().join("a/train/good/7.png")).unwrap();
        let message = TrainingSet::scan(dir.path()).unwrap().check_not_mixed_up().unwrap_err().to_string();
        assert!(message.contains("a/train/good/7.png") && message.contains("a/test/scratch/2.png"), "{message}");
    }
}
