//! Tables without borders, from the kinds' columns.
//!
//! Pages and watched rows are printed as they come: each is at least as wide as what stands above it.

use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width, presets};
use nexus_model::Timestamp;
use nexus_model::kind::{Column, KindDescriptor, Scope, Show};
use serde_json::Value;

use super::output::plain;

/// What stands where an object says nothing.
const NOTHING: &str = "-";

/// An age in one unit: `5s`, `3m`, `2h`, `4d`.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The age of a moment written in RFC 3339.
pub fn age_of(moment: &Value, now: Timestamp) -> String {
    match serde_json::from_value::<Timestamp>(moment.clone()) {
        Ok(then) if then.as_millis() > 0 => age(now.since(then).as_secs()),
        _ => NOTHING.into(),
    }
}

fn cell(object: &Value, column: &Column, now: Timestamp) -> String {
    let value = object.pointer(column.pointer).unwrap_or(&Value::Null);
    match column.show {
        Show::Age => age_of(value, now),
        Show::Count => match value {
            Value::Array(list) => list.len().to_string(),
            Value::Object(map) => map.len().to_string(),
            _ => "0".into(),
        },
        Show::Millis => match value.as_u64() {
            None => NOTHING.into(),
            Some(ms @ 0..10_000) => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
            Some(ms) => age(ms / 1000),
        },
        Show::Micros => match value.as_u64() {
            None => NOTHING.into(),
            Some(us) => format!("{}.{}ms", us / 1000, us % 1000 / 100),
        },
        Show::Of(whole) => match (value.as_u64(), object.pointer(whole).and_then(Value::as_u64)) {
            (Some(part), Some(whole)) => format!("{part}/{whole}"),
            _ => NOTHING.into(),
        },
        Show::Plain => match value {
            Value::Null => NOTHING.into(),
            Value::String(text) if text.is_empty() => NOTHING.into(),
            Value::String(text) => plain(text),
            other => plain(&other.to_string()),
        },
    }
}

/// Which columns are shown beside NAME and AGE.
#[derive(Debug, Clone, Copy, Default)]
pub struct Columns {
    pub wide: bool,
    pub project: bool,
    pub deleting: bool,
    pub region: bool,
}

/// The rows of one kind.
pub struct KindTable {
    columns: Columns,
    shown: Vec<&'static Column>,
    printer: Printer,
}

impl KindTable {
    pub fn new(kind: &'static KindDescriptor, columns: Columns) -> Self {
        let project = columns.project && kind.scope == Scope::Project;
        let columns = Columns { project, region: columns.region && kind.scope != Scope::Global, ..columns };
        let shown: Vec<_> = kind.columns.iter().filter(|c| columns.wide || !c.wide).collect();
        let mut header = Vec::new();
        if columns.region {
            header.push("REGION");
        }
        if columns.project {
            header.push("PROJECT");
        }
        header.push("NAME");
        header.extend(shown.iter().map(|c| c.title));
        if columns.deleting {
            header.push("DELETING");
        }
        header.push("AGE");
        Self { columns, shown, printer: Printer::new(&header) }
    }

    /// The lines for some objects, after the header if it was not yet given. `deleted` stands in place of the age of one
    /// that has gone.
    pub fn rows<'a>(&mut self, objects: impl IntoIterator<Item = (&'a Value, bool)>, now: Timestamp) -> String {
        let rows = objects.into_iter().map(|(object, deleted)| {
            let text = |pointer: &str| {
                let text = object.pointer(pointer).and_then(Value::as_str).filter(|t| !t.is_empty());
                text.map_or(NOTHING.to_owned(), plain)
            };
            let mut row = Vec::new();
            if self.columns.region {
                row.push(text("/metadata/region"));
            }
            if self.columns.project {
                row.push(text("/metadata/project"));
            }
            row.push(text("/metadata/name"));
            row.extend(self.shown.iter().map(|c| cell(object, c, now)));
            if self.columns.deleting {
                row.push(age_of(&object["metadata"]["deleting"], now));
            }
            row.push(if deleted { "deleted".into() } else { age_of(&object["metadata"]["created"], now) });
            row
        });
        let rows = rows.collect();
        self.printer.lines(rows)
    }
}

/// Lays out rows of text.
pub struct Printer {
    header: Option<Vec<String>>,
    widths: Vec<u16>,
}

impl Printer {
    pub fn new(header: &[&str]) -> Self {
        Self { header: Some(header.iter().map(|h| (*h).to_owned()).collect()), widths: vec![0; header.len()] }
    }

    /// The lines for `rows`, without a line break at the end.
    pub fn lines(&mut self, rows: Vec<Vec<String>>) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if let Some(header) = self.header.take() {
            table.add_row(header);
        }
        table.add_rows(rows);
        table.discover_columns();
        for (width, content) in self.widths.iter_mut().zip(table.column_max_content_widths()) {
            *width = (*width).max(content);
        }
        for (i, width) in self.widths.iter().enumerate() {
            if let Some(column) = table.column_mut(i) {
                column.set_padding((0, 3));
                // A boundary counts the padding too.
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width.saturating_add(3))));
            }
        }
        let lines: Vec<String> = table.lines().map(|l| l.trim_end().to_owned()).collect();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use nexus_model::kind;
    use serde_json::json;

    use super::*;

    #[test]
    fn ages_have_one_unit() {
        let cases = [(0, "0s"), (59, "59s"), (60, "1m"), (3599, "59m"), (7200, "2h"), (86_399, "23h"), (345_600, "4d")];
        for (seconds, text) in cases {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn rows_that_come_later_stand_under_the_first() {
        let now = Timestamp::from_millis(1_700_000_010_000);
        let app = |name: &str| {
            json!({
                "metadata": {"name": name, "project": "p", "created": "2023-11-14T22:13:20.000Z"},
                "spec": {"runtime": "container", "image": "a\nb"}, "status": {"phase": "Ready", "readyReplicas": 0},
            })
        };
        let mut table = KindTable::new(kind::find("app").unwrap(), Columns { project: true, ..Columns::default() });
        let first = table.rows([(&app("a-long-name"), false)], now);
        let lines: Vec<&str> = first.lines().collect();
        assert_eq!(lines.len(), 2, "{first}");
        let words: Vec<&str> = lines[0].split_whitespace().collect();
        assert_eq!(words, ["PROJECT", "NAME", "PHASE", "READY", "WANTED", "RUNTIME", "IMAGE", "AGE"]);
        let words: Vec<&str> = lines[1].split("   ").map(str::trim).filter(|w| !w.is_empty()).collect();
        assert_eq!(words, ["p", "a-long-name", "Ready", "0", "-", "container", "a b", "10s"], "{first}");
        let second = table.rows([(&app("b"), true)], now);
        assert_eq!(second.lines().count(), 1);
        assert_eq!(second.find("Ready"), lines[0].find("PHASE"), "{first}\n{second}");
        assert!(second.ends_with("deleted") && !second.contains(" \n"));
        assert_eq!(lines[0].find("PHASE"), Some("PROJECT   a-long-name   ".len()));
    }
}
