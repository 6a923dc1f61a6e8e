//! The training report: one HTML file without scripts, curves as inline SVG.

use crate::evaluate::Aurocs;
use crate::modes::ModesConfig;
use crate::train::Plan;
use serde::Serialize;
use std::fmt::Write;

/// What the report shows; also what `--json` writes.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Bundle file.
    pub title: String,
    /// Device.
    pub device: String,
    /// Settings.
    pub plan: Plan,
    /// Training time.
    pub seconds: f64,
    /// Loss of every step.
    pub losses: Vec<f32>,
    /// Mean image AUROC during training, (step, fraction).
    pub validations: Vec<(usize, f64)>,
    /// At the end, where there are labelled test images.
    pub test: Option<Aurocs>,
    /// Scores of the held-out normal images.
    pub calibration_scores: Vec<f32>,
    /// Images trained on, held out, tested.
    pub images: [usize; 3],
    /// Images that could not be read.
    pub skipped: usize,
}

/// What the report of `--preset fast` shows; also what `--json` writes.
#[derive(Clone, Debug, Serialize)]
pub struct ModesSummary {
    /// Bundle file.
    pub title: String,
    /// Settings.
    pub config: ModesConfig,
    /// Pictures of every mode, largest first.
    pub mode_sizes: Vec<usize>,
    /// Groups that the modes belong to.
    pub groups: usize,
    /// Time for the features, in seconds.
    pub features_seconds: f64,
    /// Time for the fit, in seconds.
    pub seconds: f64,
    /// Where there are labelled test images.
    pub test: Option<Aurocs>,
    /// Score of every normal image by a fit that has not seen it.
    pub calibration_scores: Vec<f32>,
    /// Lowest false-reject rate that they tell (a fraction).
    pub lowest_measured_rate: f64,
    /// Images fitted on, tested.
    pub images: [usize; 2],
    /// Images that could not be read.
    pub skipped: usize,
}

/// The page of `--preset fast`.
pub fn modes_html(s: &ModesSummary) -> String {
    let mut out = String::new();
    let sizes: Vec<String> = s.mode_sizes.iter().map(ToString::to_string).collect();
    let _ = write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8><title>Training report: {0}</title><style>{STYLE}</style><h1>Training report</h1><table><tr><th>Bundle<td>{0}<tr><th>Images<td>{1} fitted on, {2} tested, {3} skipped<tr><th>Modes<td>{4} in {9} groups (pictures: {5})<tr><th>Time<td>features {6:.0} s, fit {7:.0} s<tr><th>Seed<td>{8}</table>",
        esc(&s.title),
        s.images[0],
        s.images[1],
        s.skipped,
        s.mode_sizes.len(),
        sizes.join(", "),
        s.features_seconds,
        s.seconds,
        s.config.seed,
        s.groups
    );
    if let Some(test) = &s.test {
        auroc_table(&mut out, test);
    }
    let mut sorted = s.calibration_scores.clone();
    sorted.sort_by(f32::total_cmp);
    if let (Some(low), Some(high)) = (sorted.first(), sorted.last()) {
        let _ = write!(
            out,
            "<h2>Calibration</h2><p>{} normal images, each scored by a fit that has not seen it; scores from {low:.3} to {high:.3}. False-reject rates from {:.2} % up are measured, lower ones extrapolated.</p>",
            sorted.len(),
            s.lowest_measured_rate * 100.0
        );
        // Share of normal images above a score: what the one threshold does.
        let n = sorted.len() as f64;
        let every = sorted.len().div_ceil(MAX_POINTS).max(1);
        let points: Vec<(f64, f64)> =
            sorted.iter().enumerate().step_by(every).map(|(i, v)| (f64::from(*v), (1.0 - i as f64 / n).max(0.5 / n).log10())).collect();
        out.push_str("<h2>Share of normal images at or above a score</h2>");
        out.push_str(&curve(&points, &decades(&points), ("score", 2), |v| format!("{} %", share(10f64.powf(v) * 100.0))));
    }
    out
}

fn esc(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn auroc_table(out: &mut String, test: &Aurocs) {
    out.push_str("<h2>Image AUROC (%)</h2><table><tr><th>Category<th>AUROC");
    for (name, value) in &test.categories {
        let _ = write!(out, "<tr><td>{}<td class=n>{:.1}", esc(name), value * 100.0);
    }
    let _ = write!(
        out,
        "<tr><th>mean<td class=n>{:.1}<tr><th>all in one list<td class=n>{:.1}</table>",
        test.mean * 100.0,
        test.pooled * 100.0
    );
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}svg{width:100%;height:auto;background:#fafafa;border:1px solid #ddd}h2{margin-top:2rem}";
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 220.0;
/// Room for the labels of the vertical axis: eight characters.
const MARGIN: f64 = 58.0;
/// Points of the loss curve; more than pixels would not show.
const MAX_POINTS: usize = 600;

/// The page.
pub fn html(s: &Summary) -> String {
    let mut out = String::new();
    let _ = write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8><title>Training report: {0}</title><style>{STYLE}</style><h1>Training report</h1><table><tr><th>Bundle<td>{0}<tr><th>Device<td>{1}<tr><th>Images<td>{2} trained on, {3} held out, {4} tested, {5} skipped<tr><th>Steps<td>{6} of {7}, batch {8}, seed {9}<tr><th>Time<td>{10:.0} s</table>",
        esc(&s.title),
        esc(&s.device),
        s.images[0],
        s.images[1],
        s.images[2],
        s.skipped,
        s.losses.len(),
        s.plan.steps,
        s.plan.batch,
        s.plan.seed,
        s.seconds
    );
    let every = s.losses.len().div_ceil(MAX_POINTS).max(1);
    let loss: Vec<(f64, f64)> = s
        .losses
        .chunks(every)
        .enumerate()
        .map(|(i, c)| ((i * every) as f64, f64::from(c.iter().sum::<f32>() / c.len() as f32).max(1e-9).log10()))
        .collect();
    out.push_str("<h2>Loss</h2>");
    out.push_str(&curve(&loss, &quarters(&loss), ("step", 0), |v| format!("{:.3}", 10f64.powf(v))));
    if s.validations.len() > 1 {
        let points: Vec<(f64, f64)> = s.validations.iter().map(|(x, y)| (*x as f64, y * 100.0)).collect();
        out.push_str("<h2>Mean image AUROC during training (%)</h2>");
        out.push_str(&curve(&points, &quarters(&points), ("step", 0), |v| format!("{v:.1}")));
    }
    if let Some(test) = &s.test {
        auroc_table(&mut out, test);
    }
    let mut sorted = s.calibration_scores.clone();
    sorted.sort_by(f32::total_cmp);
    if let (Some(low), Some(high)) = (sorted.first(), sorted.last()) {
        let middle = sorted.get(sorted.len() / 2).copied().unwrap_or(*low);
        let _ = write!(
            out,
            "<h2>Calibration</h2><p>{} held-out normal images; scores from {low:.3} to {high:.3}, median {middle:.3}. {}</p>",
            sorted.len(),
            if sorted.len() < 200 {
                "Fewer than 200: a false-reject rate below 1 % is extrapolated. Collect more good parts and train again."
            } else {
                ""
            }
        );
    }
    out
}

/// Least and greatest of one coordinate.
fn range(points: &[(f64, f64)], of: fn(&(f64, f64)) -> f64) -> (f64, f64) {
    points.iter().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
}

/// Five ticks from the least to the greatest value.
fn quarters(points: &[(f64, f64)]) -> Vec<f64> {
    let (low, high) = range(points, |p| p.1);
    (0..=4).map(|i| low + (high - low) * f64::from(i) / 4.0).collect()
}

/// Ticks for decimal logarithms: 1 and 3 of every decade between the least and the greatest value.
fn decades(points: &[(f64, f64)]) -> Vec<f64> {
    let (low, high) = range(points, |p| p.1);
    let steps = (low.floor() as i32..=high.ceil() as i32).flat_map(|d| [f64::from(d), f64::from(d) + 3f64.log10()]);
    steps.filter(|v| (low..=high + 1e-9).contains(v)).collect()
}

/// A share in percent with the digits that it has: 100, 3, 0.3.
fn share(percent: f64) -> String {
    let decimals = if percent >= 0.95 { 0 } else { (-percent.max(1e-9).log10()).ceil() as usize };
    format!("{percent:.decimals$}")
}

/// A curve with horizontal lines at `ticks`, labelled by `label`; `name` is the horizontal axis, whose ends get `decimals` digits.
fn curve(points: &[(f64, f64)], ticks: &[f64], (name, decimals): (&str, usize), label: impl Fn(f64) -> String) -> String {
    if points.len() < 2 {
        return "<p>Too few points for a curve.</p>".into();
    }
    let (x0, x1) = range(points, |p| p.0);
    let (y0, y1) = range(points, |p| p.1);
    let span = (y1 - y0).max(1e-9);
    let place = |x: f64, y: f64| {
        (MARGIN + (x - x0) / (x1 - x0).max(1e-9) * (WIDTH - MARGIN - 12.0), 12.0 + (1.0 - (y - y0) / span) * (HEIGHT - 12.0 - 28.0))
    };
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=img>");
    for &y in ticks {
        let (_, py) = place(x0, y);
        let _ = write!(
            svg,
            "<line x1={MARGIN} x2={} y1={py:.1} y2={py:.1} stroke=\"#e2e2e2\"/><text x={} y={:.1} font-size=11 text-anchor=end>{}</text>",
            WIDTH - 12.0,
            MARGIN - 6.0,
            py + 4.0,
            label(y)
        );
    }
    let path: Vec<String> = points
        .iter()
        .map(|(x, y)| {
            let (px, py) = place(*x, *y);
            format!("{px:.1},{py:.1}")
        })
        .collect();
    let _ = write!(
        svg,
        "<polyline points=\"{}\" fill=none stroke=\"#0a64a4\" stroke-width=1.6 /><text x={MARGIN} y={:.0} font-size=11>{name} {x0:.decimals$}</text><text x={:.0} y={:.0} font-size=11 text-anchor=end>{x1:.decimals$}</text></svg>",
        path.join(" "),
        HEIGHT - 8.0,
        WIDTH - 12.0,
        HEIGHT - 8.0
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_shares_are_round_and_inside() {
        let points = [(0.0, 0.0), (1.0, 0.0036f64.log10())];
        let labels: Vec<String> = decades(&points).into_iter().rev().map(|v| share(10f64.powf(v) * 100.0)).collect();
        assert_eq!(labels, ["100", "30", "10", "3", "1"]);
        assert_eq!([share(0.3), share(0.1), share(0.05)], ["0.3", "0.1", "0.05"]);
    }
}
