//! Aligned text for terminals.

/// Rows as text: the first column to the left, the others to the right, two spaces between. A short row's missing cells are empty.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let chars = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
    let widths: Vec<usize> = (0..columns).map(|c| rows.iter().map(|row| chars(row, c)).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            if column == 0 {
                line += &format!("{cell:<width$}");
            } else {
                line += &format!("  {cell:>width$}");
            }
        }
        out += line.trim_end();
        out.push('\n');
    }
    out
}

/// Names and values, a line each, the values aligned. Further lines of a value start below its first.
pub fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let indent = format!("\n{:width$}  ", "");
    facts.iter().map(|(name, value)| format!("{name:<width$}  {}\n", value.replace('\n', &indent))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_by_characters() {
        let rows = [vec!["a".to_owned(), "1.5".into(), "–".into()], vec!["längst".into(), "12.5".into()]];
        assert_eq!(aligned(&rows), "a        1.5  –\nlängst  12.5\n");
        assert_eq!(facts(&[("a", "x\ny".into()), ("bcd", "z".into())]), "a    x\n     y\nbcd  z\n");
    }
}
