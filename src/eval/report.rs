//! An evaluation as one self-contained HTML page: no scripts, no links, pictures embedded.
//!
//! Shows what figures hide: the score distributions against the one threshold, ROC curves, and per product the worst misses and false
//! rejects with their heat maps.

use crate::anomaly::{AnomalyMap, upsample};
use crate::calibration::Calibration;
use crate::eval::metrics::{RocPoint, Scored, roc_curve};
use crate::eval::regions;
use crate::eval::runner::{Judged, Sample, load_mask};
use crate::eval::summary::{Context, Evaluation, Figures, scores};
use image::{ImageEncoder, RgbImage, RgbaImage};
use std::fmt::Write as _;
use std::path::Path;

/// Pictures shown of each kind and product: enough to see a pattern, few enough to load.
const WORST: usize = 4;
/// Longest side of an embedded picture in pixels.
const PICTURE_PX: u32 = 256;
/// JPEG quality of embedded pictures: no visible loss at this size.
const JPEG_QUALITY: u8 = 85;
/// Bars of a score histogram.
const BINS: usize = 40;

/// What the page needs besides the figures.
pub struct Heading<'a> {
    /// What was evaluated.
    pub context: &'a Context,
    /// The bundle's calibration, for the heat maps' scale.
    pub calibration: &'a Calibration,
    /// When, as shown.
    pub date: String,
}

/// The page. Reads the pictures it shows; one that cannot be read any more is left out with a note.
pub fn html(evaluation: &Evaluation, heading: &Heading<'_>) -> String {
    let mut page = Page { out: String::new() };
    page.head(evaluation, heading);
    page.table(evaluation);
    page.pooled(evaluation, heading);
    for name in evaluation.categories.keys() {
        page.category(name, evaluation, heading);
    }
    page.skipped(evaluation);
    page.out.push_str("</main></body></html>\n");
    page.out
}

struct Page {
    out: String,
}

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1d21;--dim:#667;--line:#d8dce2;--good:#2b7bba;--bad:#d1495b;--card:#f6f7f9}\
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e8eb;--dim:#99a;--line:#343a42;--good:#5aa9e6;--bad:#ef6f7f;--card:#1d2127}}\
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}main{max-width:1200px;margin:0 auto;padding:24px}\
h1{font-size:24px;margin:0 0 4px}h2{margin:36px 0 8px;font-size:19px;border-top:1px solid var(--line);padding-top:16px}h3{font-size:15px;margin:16px 0 6px}\
.dim{color:var(--dim)}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}th,td{padding:3px 12px;text-align:right;border-bottom:1px solid var(--line)}\
th:first-child,td:first-child{text-align:left}tr.sum td{font-weight:600}.row{display:flex;flex-wrap:wrap;gap:16px}\
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px;width:256px}figcaption{font-size:12px;overflow-wrap:anywhere}\
.stack{position:relative;width:256px;height:256px;overflow:hidden}.stack img{position:absolute;inset:0;width:256px;height:256px;object-fit:contain}.stack:hover img+img{opacity:0}\
svg{background:var(--card);border:1px solid var(--line);border-radius:6px}svg text{fill:var(--dim);font:11px system-ui,sans-serif}";

impl Page {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.out.write_fmt(text);
    }

    fn head(&mut self, evaluation: &Evaluation, heading: &Heading<'_>) {
        let context = heading.context;
        let defective = evaluation.images.iter().filter(|(s, _)| s.defect.is_some()).count();
        let [height, width] = context.pixel_resolution;
        self.put(format_args!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>cull eval: {model}</title><style>{STYLE}</style></head><body><main><h1>{model}</h1>\
             <p class=\"dim\">{data} · {good} good and {defective} defective pictures of {categories} products · {date}<br>\
             one threshold for all products: score {threshold:.4}, for a false-reject rate of {rate} % · pixel figures at {width}x{height} pixels, masks resized by nearest neighbour<br>\
             model SHA-256 {sha}</p>",
            model = escape(&context.model),
            data = escape(&context.data),
            good = evaluation.images.len() - defective,
            categories = evaluation.categories.len(),
            date = escape(&heading.date),
            threshold = context.threshold,
            rate = f64::from((context.false_reject_rate * 1e5).round()) / 1e3,
            sha = escape(&context.model_sha256),
        ));
    }

    fn table(&mut self, evaluation: &Evaluation) {
        self.out.push_str(
            "<table><thead><tr><th>product</th><th>good</th><th>defective</th><th>image AUROC</th><th>pixel AUROC</th><th>AUPRO</th><th>F1-max</th>\
             <th>false rejects</th><th>caught</th></tr></thead><tbody>",
        );
        let mut sums = (0, 0);
        for (name, category) in &evaluation.categories {
            sums = (sums.0 + category.good, sums.1 + category.defective);
            self.figures(name, Some((category.good, category.defective)), &category.figures, "");
        }
        self.figures("mean", None, &evaluation.mean, " class=\"sum\"");
        self.figures("pooled, one threshold", Some(sums), &evaluation.pooled, " class=\"sum\"");
        self.out.push_str("</tbody></table>");
    }

    fn figures(&mut self, name: &str, counts: Option<(usize, usize)>, figures: &Figures, class: &str) {
        let (good, defective) = counts.map_or((String::new(), String::new()), |(g, d)| (g.to_string(), d.to_string()));
        self.put(format_args!("<tr{class}><td>{}</td><td>{good}</td><td>{defective}</td>", escape(name)));
        let all = [figures.image_auroc, figures.pixel_auroc, figures.aupro, figures.f1_max, figures.false_reject_rate, figures.recall];
        for figure in all {
            self.put(format_args!("<td>{}</td>", percent(figure)));
        }
        self.out.push_str("</tr>");
    }

    fn pooled(&mut self, evaluation: &Evaluation, heading: &Heading<'_>) {
        let all: Vec<&(Sample, Judged)> = evaluation.images.iter().collect();
        self.out.push_str("<h2>All products, one threshold</h2>");
        self.curves(&scores(&all, |_| true), heading.context.threshold);
    }

    fn category(&mut self, name: &str, evaluation: &Evaluation, heading: &Heading<'_>) {
        let images: Vec<&(Sample, Judged)> = evaluation.images.iter().filter(|(s, _)| s.category == name).collect();
        self.put(format_args!("<h2>{}</h2>", escape(name)));
        self.curves(&scores(&images, |_| true), heading.context.threshold);
        if let Some(category) = evaluation.categories.get(name).filter(|c| !c.defects.is_empty()) {
            self.out.push_str("<table><thead><tr><th>defect</th><th>pictures</th><th>image AUROC</th><th>caught</th></tr></thead><tbody>");
            for (defect, figures) in &category.defects {
                let (auroc, recall) = (percent(figures.image_auroc), percent(figures.recall));
                self.put(format_args!("<tr><td>{}</td><td>{}</td><td>{auroc}</td><td>{recall}</td></tr>", escape(defect), figures.images));
            }
            self.out.push_str("</tbody></table>");
        }
        let by_score = |a: &&(Sample, Judged), b: &&(Sample, Judged)| a.1.score.total_cmp(&b.1.score);
        let mut missed: Vec<_> = images.iter().copied().filter(|(s, j)| s.defect.is_some() && !j.rejected).collect();
        missed.sort_by(by_score);
        let mut rejected: Vec<_> = images.iter().copied().filter(|(s, j)| s.defect.is_none() && j.rejected).collect();
        rejected.sort_by(|a, b| by_score(b, a));
        self.pictures("missed defects, lowest score first", &missed, heading);
        self.pictures("false rejects, highest score first", &rejected, heading);
    }

    fn pictures(&mut self, title: &str, worst: &[&(Sample, Judged)], heading: &Heading<'_>) {
        if worst.is_empty() {
            self.put(format_args!("<p class=\"dim\">no {}</p>", title.split(',').next().unwrap_or(title)));
            return;
        }
        let shown = worst.len().min(WORST);
        self.put(format_args!(
            "<h3>{title} <span class=\"dim\">({shown} of {}; point at a picture to hide its heat map)</span></h3><div class=\"row\">",
            worst.len()
        ));
        for (sample, judged) in worst.iter().take(WORST) {
            let defect = sample.defect.as_deref().unwrap_or("good");
            match Overlay::new(sample, &judged.map, heading) {
                Ok(Overlay { picture, heat }) => self.put(format_args!(
                    "<figure><div class=\"stack\"><img alt=\"\" src=\"data:image/jpeg;base64,{picture}\"><img alt=\"\" src=\"data:image/png;base64,{heat}\"></div>"
                )),
                Err(why) => self.put(format_args!("<figure><p class=\"dim\">{}</p>", escape(&why))),
            }
            self.put(format_args!(
                "<figcaption>{}<br>{} · score {:.4} · p {:.2e}</figcaption></figure>",
                escape(&short_path(&sample.path)),
                escape(defect),
                judged.score,
                judged.p_value
            ));
        }
        self.out.push_str("</div>");
    }

    /// ROC curve and score histogram, side by side.
    fn curves(&mut self, images: &[Scored], threshold: f32) {
        self.out.push_str("<div class=\"row\">");
        self.roc(&roc_curve(images));
        self.histogram(images, threshold);
        self.out.push_str("</div>");
    }

    fn roc(&mut self, curve: &[RocPoint]) {
        if curve.is_empty() {
            return;
        }
        const SIDE: f64 = 220.0;
        let mut path = String::new();
        for point in curve {
            let _ = write!(path, "{:.1},{:.1} ", 30.0 + point.false_positive_rate * SIDE, 10.0 + (1.0 - point.true_positive_rate) * SIDE);
        }
        self.put(format_args!(
            "<svg width=\"270\" height=\"264\" viewBox=\"0 0 270 264\" role=\"img\" aria-label=\"ROC curve\">\
             <path d=\"M30 230L250 10\" stroke=\"var(--line)\" stroke-dasharray=\"4\"/><path d=\"M30 10V230H250\" stroke=\"var(--dim)\" fill=\"none\"/>\
             <polyline points=\"{path}\" fill=\"none\" stroke=\"var(--good)\" stroke-width=\"2\"/>\
             <text x=\"140\" y=\"254\" text-anchor=\"middle\">false rejects</text><text x=\"30\" y=\"243\">0</text><text x=\"250\" y=\"243\" text-anchor=\"end\">1</text>\
             <text transform=\"translate(20 120) rotate(-90)\" text-anchor=\"middle\">defects caught</text></svg>"
        ));
    }

    fn histogram(&mut self, images: &[Scored], threshold: f32) {
        let finite = || images.iter().map(|i| i.score).filter(|s| s.is_finite());
        let limit = if threshold.is_finite() { threshold } else { f32::NEG_INFINITY };
        let low = finite().fold(f32::INFINITY, f32::min).min(if threshold.is_finite() { threshold } else { f32::INFINITY });
        let high = finite().fold(limit, f32::max);
        if !low.is_finite() || !high.is_finite() {
            return;
        }
        let span = f64::from(high - low).max(f64::MIN_POSITIVE);
        let at = |score: f32| f64::from(score - low) / span;
        let mut bins = [[0usize; 2]; BINS];
        for image in images.iter().filter(|i| i.score.is_finite()) {
            let bin = ((at(image.score) * BINS as f64) as usize).min(BINS - 1);
            bins[bin][usize::from(image.defective)] += 1;
        }
        let tallest = bins.iter().flatten().copied().max().unwrap_or(1).max(1) as f64;
        const WIDTH: f64 = 600.0;
        const HEIGHT: f64 = 220.0;
        self.out.push_str("<svg width=\"640\" height=\"264\" viewBox=\"0 0 640 264\" role=\"img\" aria-label=\"scores\"><path d=\"M20 230H620\" stroke=\"var(--dim)\"/>");
        for (index, counts) in bins.iter().enumerate() {
            for (kind, colour) in ["var(--good)", "var(--bad)"].into_iter().enumerate() {
                let height = counts[kind] as f64 / tallest * HEIGHT;
                let x = 20.0 + (index as f64 + 0.5 * kind as f64) * WIDTH / BINS as f64;
                if counts[kind] > 0 {
                    self.put(format_args!(
                        "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"6.5\" height=\"{height:.1}\" fill=\"{colour}\"/>",
                        230.0 - height
                    ));
                }
            }
        }
        if threshold.is_finite() {
            let x = 20.0 + at(threshold) * WIDTH;
            // Kept inside the picture where the threshold is at an end of the scale.
            let label_x = x.clamp(70.0, 570.0);
            self.put(format_args!(
                "<path d=\"M{x:.1} 10V230\" stroke=\"var(--fg)\" stroke-dasharray=\"5 3\"/>\
                 <text x=\"{label_x:.1}\" y=\"257\" text-anchor=\"middle\">threshold {threshold:.3}</text>"
            ));
        }
        self.put(format_args!(
            "<text x=\"20\" y=\"243\">{low:.3}</text><text x=\"620\" y=\"243\" text-anchor=\"end\">{high:.3}</text>\
             <text x=\"610\" y=\"24\" text-anchor=\"end\"><tspan fill=\"var(--good)\">good</tspan> · <tspan fill=\"var(--bad)\">defective</tspan></text></svg>"
        ));
    }

    fn skipped(&mut self, evaluation: &Evaluation) {
        if evaluation.skipped.is_empty() {
            return;
        }
        self.put(format_args!("<h2>{} pictures could not be used</h2><ul>", evaluation.skipped.len()));
        for skipped in &evaluation.skipped {
            self.put(format_args!("<li>{}: {}</li>", escape(&skipped.path), escape(&skipped.why)));
        }
        self.out.push_str("</ul>");
    }
}

/// A picture and its heat map, both base64.
struct Overlay {
    picture: String,
    heat: String,
}

impl Overlay {
    fn new(sample: &Sample, map: &AnomalyMap, heading: &Heading<'_>) -> Result<Self, String> {
        let picture = image::open(&sample.path).map_err(|e| format!("{}: {e}", sample.path.display()))?.into_rgb8();
        let longest = picture.width().max(picture.height()).max(1);
        let scale = |side: u32| ((u64::from(side) * u64::from(PICTURE_PX.min(longest)) / u64::from(longest)) as u32).max(1);
        let (width, height) = (scale(picture.width()), scale(picture.height()));
        let picture = image::imageops::resize(&picture, width, height, image::imageops::FilterType::Triangle);
        let mask = match (&sample.mask, &sample.defect) {
            (Some(mask), Some(_)) => Some(load_mask(mask, width as usize, height as usize).map_err(|e| e.to_string())?),
            _ => None,
        };
        let (cool, hot) = (heading.calibration.score_at(0.5), heading.context.threshold);
        let heat = heat_map(map, width, height, cool, hot, mask.as_deref());
        Ok(Self { picture: jpeg(&picture)?, heat: png(&heat)? })
    }
}

/// Heat map with the defect's outline on a transparent ground. From `cool` (the normal median) to `hot` (the threshold) it fades in from
/// yellow to red; above, it is full red.
fn heat_map(map: &AnomalyMap, width: u32, height: u32, cool: f32, hot: f32, mask: Option<&[u8]>) -> RgbaImage {
    let (w, h) = (width as usize, height as usize);
    let mut values = vec![0.0; w * h];
    upsample(map, h, w, &mut values);
    let mut labels = Vec::new();
    if let Some(mask) = mask {
        regions::label(mask, w, h, &mut labels);
    }
    let inside = |x: i64, y: i64| {
        let at = usize::try_from(y).ok().zip(usize::try_from(x).ok()).filter(|(y, x)| *y < h && *x < w).map(|(y, x)| y * w + x);
        at.and_then(|at| labels.get(at)).is_some_and(|label| *label != 0)
    };
    RgbaImage::from_fn(width, height, |x, y| {
        let (px, py) = (i64::from(x), i64::from(y));
        // Outline: just outside the defect, so that the defect itself stays visible.
        if !inside(px, py) && [(-1, 0), (1, 0), (0, -1), (0, 1)].iter().any(|(dx, dy)| inside(px + dx, py + dy)) {
            return image::Rgba([0, 230, 255, 255]);
        }
        let value = values.get(y as usize * w + x as usize).copied().unwrap_or(f32::NAN);
        let span = (hot - cool).max(f32::MIN_POSITIVE);
        // A map value that is not a number rejects the part: shown as hot as can be.
        let heat = if value.is_nan() { 1.0 } else { ((value - cool) / span).clamp(0.0, 1.0) };
        image::Rgba([255, (210.0 * (1.0 - heat)) as u8, 0, (150.0 * heat) as u8])
    })
}

fn jpeg(picture: &RgbImage) -> Result<String, String> {
    let mut bytes = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY);
    encoder.write_image(picture, picture.width(), picture.height(), image::ExtendedColorType::Rgb8).map_err(|e| e.to_string())?;
    Ok(base64(&bytes))
}

fn png(picture: &RgbaImage) -> Result<String, String> {
    let mut bytes = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    encoder.write_image(picture, picture.width(), picture.height(), image::ExtendedColorType::Rgba8).map_err(|e| e.to_string())?;
    Ok(base64(&bytes))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let index = (bits >> (18 - 6 * i) & 63) as usize;
            out.push(if i <= chunk.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    out
}

/// Names come from folders: they must not become markup.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn percent(figure: Option<f64>) -> String {
    figure.map_or_else(|| "–".to_owned(), |f| format!("{:.1}", f * 100.0))
}

/// The last three parts of a path: split, defect, file.
fn short_path(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|p| p.to_string_lossy()).collect();
    parts.get(parts.len().saturating_sub(3)..).unwrap_or_default().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_equals_the_rfc_vectors() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xef, 0xbe]), "/+++");
    }

    #[test]
    fn heat_maps_are_transparent_on_normal_parts_and_outline_the_defect() {
        let map = AnomalyMap { grid_rows: 2, grid_cols: 2, values: vec![0.0, 2.0, 0.0, 2.0] };
        let mut mask = vec![0; 81];
        mask[4 * 9 + 1] = 255;
        let heat = heat_map(&map, 9, 9, 1.0, 2.0, Some(&mask));
        assert_eq!(heat.get_pixel(0, 0).0[3], 0);
        assert_eq!(heat.get_pixel(8, 4).0, [255, 0, 0, 150]);
        assert_eq!(heat.get_pixel(1, 3).0, [0, 230, 255, 255]);
        assert_ne!(heat.get_pixel(1, 4).0, [0, 230, 255, 255]);
    }

    #[test]
    fn names_from_folders_cannot_become_markup() {
        assert_eq!(escape("<b a=\"1\">&"), "&lt;b a=&quot;1&quot;&gt;&amp;");
    }
}
