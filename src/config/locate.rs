//! Where each field of a RON text stands, so that an error can name the field and its line and column.
//!
//! `ron` checks the text; this scanner only finds positions, in good text and, as far as it goes, in bad text. It never fails and never
//! panics: what it does not understand ends the scan.

/// One value in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Dotted field names from the top, without variant names; `[i]` for list and tuple elements. Example: `source.controls[0][1]`.
    pub path: String,
    /// Byte offset of the field's name, or of the value where there is no name.
    pub name_at: usize,
    /// Byte offset of the value.
    pub value_at: usize,
    /// Byte offset just after the value (where the scan stopped, in bad text).
    pub end: usize,
}

/// Nesting beyond which the scan stops; `ron` itself refuses more.
const MAX_DEPTH: usize = 128;

/// All values of `text` in the order in which they start. The first is the whole configuration, with an empty path.
pub(super) fn entries(text: &str) -> Vec<Entry> {
    let mut scan = Scan { text, at: 0, entries: Vec::new() };
    scan.attributes();
    scan.value(String::new(), None, 0);
    scan.entries
}

/// 1-based line and column (in characters) of a byte offset; an offset past the end means the end.
pub(super) fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.char_indices().take_while(|(at, _)| *at < offset).map(|(_, c)| c);
    before.fold((1, 1), |(line, column), c| if c == '\n' { (line + 1, 1) } else { (line, column + 1) })
}

/// Byte offset of a 1-based line and column.
pub(super) fn offset(text: &str, line: usize, column: usize) -> usize {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let rest = text.get(start..).unwrap_or_default();
    start + rest.char_indices().nth(column.saturating_sub(1)).map_or(rest.len(), |(at, _)| at)
}

struct Scan<'a> {
    text: &'a str,
    at: usize,
    entries: Vec<Entry>,
}

impl Scan<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn eat(&mut self, wanted: &str) -> bool {
        let found = self.rest().starts_with(wanted);
        if found {
            self.at += wanted.len();
        }
        found
    }

    /// Move behind the next `end`, or to the end of the text.
    fn skip_past(&mut self, end: &str) {
        self.at += self.rest().find(end).map_or(self.rest().len(), |found| found + end.len());
    }

    fn skip_space(&mut self) {
        loop {
            let rest = self.rest();
            self.at += rest.len() - rest.trim_start().len();
            if self.rest().starts_with("//") {
                self.skip_past("\n");
            } else if self.eat("/*") {
                let mut depth = 1;
                while depth > 0 && !self.rest().is_empty() {
                    if self.eat("/*") {
                        depth += 1;
                    } else if self.eat("*/") {
                        depth -= 1;
                    } else {
                        self.at += self.peek().map_or(0, char::len_utf8);
                    }
                }
            } else {
                return;
            }
        }
    }

    /// `#![enable(...)]`, any number of them.
    fn attributes(&mut self) {
        self.skip_space();
        while self.rest().starts_with('#') {
            self.skip_past("]");
            self.skip_space();
        }
    }

    fn identifier(&mut self) -> Option<String> {
        let rest = self.rest();
        let name = rest.strip_prefix("r#").filter(|raw| raw.starts_with(|c: char| c.is_alphabetic() || c == '_')).unwrap_or(rest);
        let prefix = rest.len() - name.len();
        let len = name.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(name.len());
        let name = name.get(..len).filter(|n| n.starts_with(|c: char| c.is_alphabetic() || c == '_'))?.to_owned();
        self.at += prefix + len;
        Some(name)
    }

    /// A string, raw string, byte string or character, if one starts here.
    fn quoted(&mut self) -> bool {
        let rest = self.rest();
        let body = rest.strip_prefix('b').unwrap_or(rest);
        let raw = body.strip_prefix('r').unwrap_or(body);
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if body.starts_with('r') && raw.get(hashes..).is_some_and(|r| r.starts_with('"')) {
            self.at += rest.len() - raw.len() + hashes + 1;
            self.skip_past(&format!("\"{}", "#".repeat(hashes)));
            return true;
        }
        let quote = match body.chars().next() {
            Some(quote @ ('"' | '\'')) => quote,
            _ => return false,
        };
        self.at += rest.len() - body.len() + 1;
        while let Some(c) = self.peek() {
            self.at += c.len_utf8();
            if c == quote {
                break;
            }
            if c == '\\' {
                self.at += self.peek().map_or(0, char::len_utf8);
            }
        }
        true
    }

    /// One value; `false` when the text stopped making sense.
    fn value(&mut self, path: String, name_at: Option<usize>, depth: usize) -> bool {
        self.skip_space();
        let (index, value_at) = (self.entries.len(), self.at);
        self.entries.push(Entry { path: path.clone(), name_at: name_at.unwrap_or(value_at), value_at, end: value_at });
        let understood = depth < MAX_DEPTH && self.value_body(&path, depth);
        let end = self.at;
        if let Some(entry) = self.entries.get_mut(index) {
            entry.end = end;
        }
        understood
    }

    fn value_body(&mut self, path: &str, depth: usize) -> bool {
        if self.quoted() {
            return true;
        }
        let named = self.identifier().is_some();
        if named {
            let after_name = self.at;
            self.skip_space();
            if self.peek() != Some('(') {
                self.at = after_name;
                return true;
            }
        }
        if self.eat("(") {
            return self.items(path, ")", named, depth);
        }
        if self.eat("[") {
            return self.items(path, "]", false, depth);
        }
        if self.eat("{") {
            return self.items(path, "}", false, depth);
        }
        let rest = self.rest();
        let len = rest.find(|c: char| c.is_whitespace() || ",:()[]{}/".contains(c)).unwrap_or(rest.len());
        self.at += len;
        len > 0
    }

    /// What stands between brackets. `transparent`: an element without a name right inside a named variant (`Some(…)`, `Path(…)`) keeps
    /// the variant's own path.
    fn items(&mut self, path: &str, close: &str, transparent: bool, depth: usize) -> bool {
        let mut index = 0;
        loop {
            self.skip_space();
            if self.eat(close) {
                return true;
            }
            let start = self.at;
            let name = if close == ")" { self.identifier() } else { None };
            self.skip_space();
            let element = match name.filter(|_| self.peek() == Some(':')) {
                Some(name) => {
                    self.at += 1;
                    if path.is_empty() { name } else { format!("{path}.{name}") }
                }
                None => {
                    self.at = start;
                    if transparent && index == 0 { path.to_owned() } else { format!("{path}[{index}]") }
                }
            };
            if !self.value(element, Some(start), depth + 1) {
                return false;
            }
            self.skip_space();
            if close == "}" && self.eat(":") && !self.value(format!("{path}{{{index}}}"), None, depth + 1) {
                return false;
            }
            self.skip_space();
            index += 1;
            if !self.eat(",") && !self.rest().starts_with(close) {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(text: &str) -> Vec<(String, String)> {
        entries(text).into_iter().map(|e| (e.path, text[e.value_at..e.end].to_owned())).collect()
    }

    #[test]
    fn nested_fields_have_dotted_paths() {
        let text = "#![enable(implicit_some)]\nConfig( // (a: 1)\n a: 1.5, b: Camera(c: Path(\"x) // y\"), d: [(\"e\", -3), (\"f\", 4)]), /* g: ( */ h: Some((i: None)),\n)";
        let expected = [
            ("", text[text.find("Config").unwrap_or(0)..].trim()),
            ("a", "1.5"),
            ("b", "Camera(c: Path(\"x) // y\"), d: [(\"e\", -3), (\"f\", 4)])"),
            ("b.c", "Path(\"x) // y\")"),
            ("b.c", "\"x) // y\""),
            ("b.d", "[(\"e\", -3), (\"f\", 4)]"),
            ("b.d[0]", "(\"e\", -3)"),
            ("b.d[0][0]", "\"e\""),
            ("b.d[0][1]", "-3"),
            ("b.d[1]", "(\"f\", 4)"),
            ("b.d[1][0]", "\"f\""),
            ("b.d[1][1]", "4"),
            ("h", "Some((i: None))"),
            ("h", "(i: None)"),
            ("h.i", "None"),
        ];
        assert_eq!(found(text), expected.map(|(p, v)| (p.to_owned(), v.to_owned())));
    }

    #[test]
    fn quotes_of_all_kinds_hide_brackets() {
        let text = r####"(a: r#"x"),y"#, b: '(', c: '\'', d: "\")", e: br"(", f: b"(", g: 1)"####;
        let paths: Vec<_> = found(text).into_iter().map(|(p, _)| p).collect();
        assert_eq!(paths, ["", "a", "b", "c", "d", "e", "f", "g"]);
    }

    #[test]
    fn lines_and_columns_count_characters_from_one() {
        let text = "(ä: 1,\n  b: 2)";
        let at = text.find("b:").unwrap_or(0);
        assert_eq!(line_column(text, at), (2, 3));
        assert_eq!(offset(text, 2, 3), at);
        assert_eq!(line_column(text, text.find(": 1").unwrap_or(0)), (1, 3));
        assert_eq!(line_column(text, 999), (2, 8));
        assert_eq!(offset(text, 9, 9), text.len());
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[(){}\\[\\]a-c:,\"'/*#r\\\\ \n0-9.ä-]{0,80}") {
            for entry in entries(&text) {
                prop_assert!(entry.name_at <= entry.value_at && entry.value_at <= entry.end && entry.end <= text.len());
                prop_assert!(text.is_char_boundary(entry.value_at) && text.is_char_boundary(entry.end));
                let (line, column) = line_column(&text, entry.value_at);
                prop_assert_eq!(offset(&text, line, column), entry.value_at);
            }
        }
    }
}
