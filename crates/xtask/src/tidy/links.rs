//! Relative links in Markdown lead somewhere.

use std::path::Path;

use super::{Finding, Source};

pub fn check(source: &Source<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !source.has_extension("md") {
        return findings;
    }
    let folder = source.root.join(source.path.parent().unwrap_or(Path::new("")));
    let mut in_code = false;
    for (index, line) in source.text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for target in targets(line) {
            if !folder.join(target).exists() {
                findings.push(source.finding(index + 1, "dead-link", format!("`{target}` does not exist")));
            }
        }
    }
    findings
}

/// The files that a line links to, without addresses and anchors.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| {
        let target = rest.split([')', ' ', '#']).next()?;
        (!target.is_empty() && !target.contains("://") && !target.starts_with("mailto:")).then_some(target)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_links_are_found() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("docs")).unwrap();
        std::fs::write(root.path().join("docs/real.md"), "x").unwrap();
        let text = "[a](docs/real.md#part) [b](docs/gone.md) [c](https://example.org/x) [d](#here)\n\
                    ```\n[e](nowhere)\n```\n[f](also/gone)\n";
        let source = Source { root: root.path(), path: Path::new("README.md"), text };
        let found: Vec<_> = check(&source).into_iter().map(|f| (f.line, f.message)).collect();
        assert_eq!(
            found,
            [(1, "`docs/gone.md` does not exist".to_owned()), (5, "`also/gone` does not exist".to_owned())]
        );
    }
}
