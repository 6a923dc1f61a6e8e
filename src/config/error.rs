//! Turns what `ron` and the checks find into one sentence: where, what was found, what is accepted.

use super::fields;
use super::locate::{self, Entry};
use ron::error::{Error as Ron, SpannedError};
use std::path::{Path, PathBuf};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {}: {source}; give an existing RON file (deploy/cull.ron is a commented template)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is far too large to be a configuration.
    #[error("configuration {} is larger than {} KB: this is not a configuration file", path.display(), super::MAX_FILE_BYTES / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The text is not RON, has an unknown or missing field, or a value outside its range.
    #[error("{}:{line}:{column}: {message}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// 1-based.
        line: usize,
        /// 1-based, in characters.
        column: usize,
        /// The field, what was found and what is accepted.
        message: String,
    },
}

impl ConfigError {
    pub(super) fn at(file: &Path, text: &str, offset: usize, message: String) -> Self {
        let (line, column) = locate::line_column(text, offset);
        Self::Invalid { file: file.to_owned(), line, column, message }
    }

    /// Describe what `ron` refused.
    pub(super) fn from_ron(file: &Path, text: &str, error: &SpannedError) -> Self {
        let start = locate::offset(text, error.span.start.line, error.span.start.col);
        let end = locate::offset(text, error.span.end.line, error.span.end.col);
        let (offset, message) = describe(text, start, end, &error.code);
        Self::at(file, text, offset, message)
    }
}

/// Byte offset to point at, and the sentence.
fn describe(text: &str, start: usize, end: usize, code: &Ron) -> (usize, String) {
    let entries = locate::entries(text);
    // The cursor ends at or just after the offending token, so skip the space before it.
    let after_space = |at: usize| at + text.get(at..).map_or(0, |rest| rest.len() - rest.trim_start().len());
    let token = after_space(start);
    let containing = |at: usize| entries.iter().filter(move |e| e.value_at <= at && at < e.end).max_by_key(|e| e.value_at);
    match code {
        Ron::NoSuchStructField { expected, found, .. } => {
            let owner = containing(token).map_or("", |e| parent(&e.path, found));
            let place = if owner.is_empty() { String::new() } else { format!(" in `{owner}`") };
            (token, format!("unknown field `{found}`{place}{}; accepted: {}", did_you_mean(found, expected), expected.join(", ")))
        }
        Ron::NoSuchEnumVariant { expected, found, .. } => {
            let field = containing(token).map(|e| format!("`{}`: ", e.path)).unwrap_or_default();
            (token, format!("{field}unknown value `{found}`{}; accepted: {}", did_you_mean(found, expected), expected.join(", ")))
        }
        Ron::MissingStructField { field, .. } => {
            let owner = containing(start).or(entries.first());
            let path = owner.map(|e| join(&e.path, field)).unwrap_or_else(|| (*field).to_owned());
            let at = owner.map_or(token, |e| e.value_at);
            (at, format!("field `{path}` is missing{}", accepted(&path)))
        }
        Ron::DuplicateStructField { field, .. } => (token, format!("field `{field}` is given twice; keep one of them")),
        Ron::ExpectedStringEnd => (token, "this string has no closing quote `\"`".to_owned()),
        Ron::UnclosedBlockComment => {
            (text.get(..start).and_then(|t| t.rfind("/*")).unwrap_or(token), "this comment has no closing `*/`".to_owned())
        }
        Ron::TrailingCharacters => (token, format!("unexpected text after the configuration's closing `)`: {}", excerpt(text, token))),
        Ron::ExpectedMapColon => (token, format!("expected `:` between a field's name and its value, found {}", excerpt(text, token))),
        Ron::ExpectedIdentifier
            if text.get(..token).is_some_and(|t| t.trim_end().ends_with('(')) && text.get(token..).is_some_and(|t| t.starts_with('(')) =>
        {
            (token, "one pair of parentheses too many: write `Name(field: value)`, not `Name((field: value))`".to_owned())
        }
        Ron::NoSuchExtension(name) => (
            start,
            format!(
                "unknown RON extension `{name}`; `implicit_some` and `unwrap_variant_newtypes` are on by default, remove the `#![enable(…)]` line"
            ),
        ),
        Ron::ExpectedNamedStructLike("Config") => {
            (token, format!("a configuration starts with `(` and ends with `)`, found {}", excerpt(text, token)))
        }
        _ => {
            // The value at fault: the innermost that the cursor stands in or has just left.
            let last = end.max(token);
            let value = entries
                .iter()
                .filter(|e| !e.path.is_empty() && e.value_at <= last && (token < e.end || last <= e.end))
                .max_by_key(|e| e.value_at);
            match value.filter(|e| is_value_error(code) || e.value_at < token && is_scalar(text, e)) {
                Some(entry) => {
                    let found = excerpt_of(text.get(entry.value_at..entry.end).unwrap_or_default());
                    (entry.value_at, format!("`{}`: found {found}{}", entry.path, accepted_or(&entry.path, code)))
                }
                None => {
                    let what = match code {
                        Ron::ExpectedComma => "expected `,` or the closing bracket".to_owned(),
                        Ron::Eof => "the text ends too early: a closing bracket is missing".to_owned(),
                        other => lower_first(&other.to_string()),
                    };
                    (token, format!("{what}, found {}", excerpt(text, token)))
                }
            }
        }
    }
}

/// Errors that speak of a value's kind or size, not of the text's structure.
fn is_value_error(code: &Ron) -> bool {
    !matches!(
        code,
        Ron::ExpectedComma | Ron::Eof | Ron::ExpectedStructLikeEnd | Ron::ExpectedArrayEnd | Ron::ExpectedMapEnd | Ron::UnexpectedChar(_)
    )
}

fn is_scalar(text: &str, entry: &Entry) -> bool {
    text.get(entry.value_at..entry.end).is_some_and(|value| !value.contains(['(', '[', '{', '"']) && !value.is_empty())
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// The path without its last field, if that is `field`.
fn parent<'a>(path: &'a str, field: &str) -> &'a str {
    path.strip_suffix(field).map_or(path, |owner| owner.trim_end_matches('.'))
}

fn accepted(path: &str) -> String {
    fields::accepted(path).map(|a| format!("; accepted: {a}")).unwrap_or_default()
}

fn accepted_or(path: &str, code: &Ron) -> String {
    fields::accepted(path).map_or_else(|| format!("; {}", lower_first(&code.to_string())), |a| format!("; accepted: {a}"))
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// The token at an offset, quoted, for a message.
fn excerpt(text: &str, at: usize) -> String {
    let rest = text.get(at..).unwrap_or_default();
    let len = rest.find(['\n', ',']).filter(|len| *len > 0).unwrap_or(rest.len().min(1));
    excerpt_of(rest.get(..len).unwrap_or(rest))
}

/// Longest piece of the text that a message repeats, in characters.
const EXCERPT_CHARS: usize = 40;

fn excerpt_of(found: &str) -> String {
    let line: String = found.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(EXCERPT_CHARS) {
        _ if line.is_empty() => "the end of the text".to_owned(),
        Some((cut, _)) => format!("`{}…`", line.get(..cut).unwrap_or_default()),
        None => format!("`{line}`"),
    }
}

/// Similarity from which a name is offered: one slip in a short word, two or three in a long one.
const NEAR_MISS: f64 = 0.6;

fn did_you_mean(found: &str, known: &[&str]) -> String {
    let plain = |name: &str| name.to_lowercase().replace(['_', '-'], "");
    let score = |name: &str| strsim::normalized_damerau_levenshtein(&plain(found), &plain(name));
    let best = known.iter().map(|name| (score(name), name)).max_by(|a, b| a.0.total_cmp(&b.0));
    best.filter(|(score, _)| *score >= NEAR_MISS).map(|(_, name)| format!("; did you mean `{name}`?")).unwrap_or_default()
}
