//! Policies as text: how involved they are, and what their conditions say.
//!
//! Cedar's parser and validator follow nesting and chains of operators by recursion: without a bound a short text could
//! exhaust the stack. So [`too_involved`] looks first, by a scan that knows strings, comments, words and single characters.

use super::{MAX_DEPTH, MAX_OPERATORS};

/// What stands at a place of a text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    /// A string or a comment: nothing in it counts.
    Opaque,
    Other(u8),
}

/// The tokens of a text with the bytes where they begin and end.
struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Iterator for Scan<'a> {
    type Item = (usize, usize, Token<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.text.as_bytes().get(self.at..).filter(|r| !r.is_empty())?;
        let is_word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
        let (length, token) = match rest[0] {
            b'"' => {
                let mut end = 1;
                while end < rest.len() && rest[end] != b'"' {
                    end += if rest[end] == b'\\' { 2 } else { 1 };
                }
                ((end + 1).min(rest.len()), Token::Opaque)
            }
            b'/' if rest.get(1) == Some(&b'/') => {
                (rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()), Token::Opaque)
            }
            b if is_word(&b) => {
                let length = rest.iter().position(|b| !is_word(b)).unwrap_or(rest.len());
                // ASCII, so at a character's border.
                (length, Token::Word(&self.text[self.at..self.at + length]))
            }
            other => (1, Token::Other(other)),
        };
        let begin = self.at;
        self.at += length;
        Some((begin, self.at, token))
    }
}

fn scan(text: &str) -> Scan<'_> {
    Scan { text, at: 0 }
}

/// Where a text nests deeper, or one of its statements has more operators, than is allowed.
pub(super) fn too_involved(text: &str) -> Option<usize> {
    let (mut depth, mut operators) = (0_usize, 0_usize);
    for (begin, _, token) in scan(text) {
        match token {
            Token::Other(b'(' | b'[' | b'{') => depth += 1,
            Token::Other(b')' | b']' | b'}') => depth = depth.saturating_sub(1),
            Token::Other(b';') => operators = 0,
            Token::Other(b'&' | b'|' | b'+' | b'-' | b'*' | b'!' | b'<' | b'>' | b'=' | b'.') => operators += 1,
            // An `if` reaches as deep as a bracket, and nothing closes it.
            Token::Word("if") => operators += MAX_OPERATORS / MAX_DEPTH,
            _ => {}
        }
        if depth > MAX_DEPTH || operators > MAX_OPERATORS {
            return Some(begin);
        }
    }
    None
}

/// The conditions of one statement that Cedar has read, as expressions: what `when` asks for and what `unless` rules out.
pub(super) fn conditions(statement: &str) -> Vec<String> {
    let (mut depth, mut negated, mut from) = (0_usize, None, 0);
    let mut found = Vec::new();
    for (begin, end, token) in scan(statement) {
        match token {
            Token::Word("when") if depth == 0 => negated = Some(false),
            Token::Word("unless") if depth == 0 => negated = Some(true),
            Token::Other(b'(' | b'[' | b'{') => {
                depth += 1;
                if depth == 1 {
                    from = end;
                }
            }
            Token::Other(b')' | b']' | b'}') => {
                depth = depth.saturating_sub(1);
                if let Some(negated) = negated.filter(|_| depth == 0) {
                    // The line's end closes a comment that may stand last.
                    let not = if negated { "!" } else { "" };
                    found.push(format!("{not}({}\n)", &statement[from..begin]));
                }
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_found_between_strings_and_comments() {
        let text = "@id(\"when { x }\")\n// unless { y }\npermit (principal, action, resource)\n\
                    when { resource.name == \"}\\\"{\" // }\n } unless { {a: [1]} == context.b };";
        let squeezed: Vec<String> = conditions(text).iter().map(|c| c.split_whitespace().collect()).collect();
        assert_eq!(squeezed, ["(resource.name==\"}\\\"{\"//})", "!({a:[1]}==context.b)"]);
        assert!(conditions("forbid (principal, action in [Action::\"when\"], resource);").is_empty());
    }

    #[test]
    fn a_string_or_comment_is_not_involved() {
        assert_eq!(too_involved(&format!("\"{}\" // {}", "(".repeat(99), "[".repeat(99))), None);
        assert_eq!(too_involved(&"(".repeat(99)), Some(MAX_DEPTH));
        assert_eq!(too_involved("\"unended \\"), None);
    }
}
