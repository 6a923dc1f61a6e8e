//! Connected regions of a defect mask. Pure: no I/O.

/// Label the 8-connected regions of a mask (the definition of MVTec-AD's AUPRO).
///
/// `mask` is `[height, width]`, row-major; anything but 0 is defect. `labels` gets the same layout: 0 outside, else 1 to the returned
/// count, numbered in scan order of each region's first pixel. A mask whose length is not `width * height` has no regions.
pub fn label(mask: &[u8], width: usize, height: usize, labels: &mut Vec<u32>) -> u32 {
    labels.clear();
    labels.resize(mask.len(), 0);
    if width.checked_mul(height) != Some(mask.len()) {
        return 0;
    }
    let mut count = 0;
    let mut open: Vec<(usize, usize)> = Vec::new();
    for start_y in 0..height {
        for start_x in 0..width {
            let start = start_y * width + start_x;
            if mask[start] == 0 || labels[start] != 0 {
                continue;
            }
            count += 1;
            labels[start] = count;
            open.push((start_x, start_y));
            // An explicit stack: a region may be as large as the picture, which recursion would not survive.
            while let Some((x, y)) = open.pop() {
                for near_y in y.saturating_sub(1)..=(y + 1).min(height - 1) {
                    for near_x in x.saturating_sub(1)..=(x + 1).min(width - 1) {
                        let near = near_y * width + near_x;
                        if mask[near] != 0 && labels[near] == 0 {
                            labels[near] = count;
                            open.push((near_x, near_y));
                        }
                    }
                }
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(rows: &[&str]) -> (u32, Vec<u32>) {
        let mask: Vec<u8> = rows.iter().flat_map(|row| row.bytes().map(|b| u8::from(b == b'#'))).collect();
        let mut labels = Vec::new();
        let count = label(&mask, rows[0].len(), rows.len(), &mut labels);
        (count, labels)
    }

    #[test]
    fn diagonal_pixels_are_one_region() {
        let (count, labels) = labelled(&["#..#", ".#..", "...#"]);
        assert_eq!(count, 3);
        assert_eq!(labels, [1, 0, 0, 2, 0, 1, 0, 0, 0, 0, 0, 3]);
    }

    #[test]
    fn rows_do_not_wrap_round() {
        assert_eq!(labelled(&["..#", "#.."]).0, 2);
    }

    #[test]
    fn a_spiral_and_a_full_mask_are_one_region_each() {
        assert_eq!(labelled(&["#####", "....#", "###.#", "#...#", "#####"]).0, 1);
        assert_eq!(labelled(&["###", "###"]).0, 1);
        assert_eq!(labelled(&["...", "..."]).0, 0);
    }

    #[test]
    fn a_mask_of_the_wrong_length_has_no_regions() {
        let mut labels = vec![7];
        assert_eq!(label(&[1, 1, 1], 2, 2, &mut labels), 0);
        assert_eq!(labels, [0, 0, 0]);
    }
}
