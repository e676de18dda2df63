//! The paths of the audit log.

use serde_json::{Map, Value, json};

use super::operations::{answers, operation, parameter, success};
use crate::audit::{ASKED, Asked, MAX_FILTER, MAX_NUMBER, MAX_PROVEN};
use crate::list::{DEFAULT_LIMIT, MAX_LIMIT};
use crate::route::audit_template;

fn number(name: &str, about: &str, is_needed: bool) -> Value {
    let schema = json!({"type": "integer", "minimum": 0, "maximum": MAX_NUMBER});
    json!({"name": name, "in": "query", "description": about, "required": is_needed, "schema": schema, "example": 0})
}

fn text(name: &str, about: &str) -> Value {
    let schema = json!({"type": "string", "minLength": 1, "maxLength": MAX_FILTER});
    json!({"name": name, "in": "query", "description": about, "schema": schema})
}

fn filters() -> Vec<Value> {
    let limit = json!({"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT});
    vec![
        json!({"name": "limit", "in": "query", "description": "The most records to answer.", "schema": limit}),
        number("cursor", "Goes on after a page.", false),
        text("actor", "Who did it: its name, or `user:ORG/NAME`, `service-account:ORG/NAME`, `operator:NAME`."),
        text("action", "What was done, such as `apps:create`."),
        text("kind", "The plural of what it was done to, such as `apps`."),
        text("name", "The name of what it was done to; `ORG/NAME` for what belongs to an organization."),
        text("project", "The project of what it was done to."),
        number("since", "Not before this time, in milliseconds since 1970.", false),
        number("until", "Before this time, likewise.", false),
    ]
}

pub(super) fn paths(paths: &mut Map<String, Value>) {
    for (_, asked) in ASKED {
        paths.insert(audit_template(asked, false), described(asked, false));
        if asked != Asked::Forget {
            paths.insert(audit_template(asked, true), described(asked, true));
        }
    }
}

/// A path of the log; of what is about one organization, or of everything.
fn described(asked: Asked, in_organization: bool) -> Value {
    let (id, about, more) = match asked {
        Asked::Records => ("listAuditRecords", "List records, the newest first", filters()),
        Asked::Export => {
            let sizes = json!({"type": "array", "maxItems": MAX_PROVEN, "items": {
                "type": "integer", "minimum": 0, "maximum": MAX_NUMBER,
            }});
            let prove = json!({
                "name": "prove", "in": "query", "style": "form", "explode": true, "schema": sizes,
                "description": "Sizes of earlier heads that the export is to be proven consistent with.",
            });
            let from = number("from", "The first record.", false);
            ("exportAudit", "Export records so that they verify offline", vec![from, prove])
        }
        Asked::Head => ("getAuditHead", "The signed head of what is committed now", Vec::new()),
        Asked::Heads => ("listAuditHeads", "The heads that were signed each minute", Vec::new()),
        Asked::Keys => ("listAuditKeys", "The public keys that heads are signed with", Vec::new()),
        Asked::Inclusion => {
            let index = number("index", "Which record.", true);
            ("proveAuditInclusion", "Prove that a record is in the log", vec![index])
        }
        Asked::Consistency => {
            let sizes = vec![number("first", "The smaller size.", true), number("second", "The bigger size.", true)];
            ("proveAuditConsistency", "Prove that the log only grew between two sizes", sizes)
        }
        Asked::Forget => ("forgetAuditPrincipal", "Shred the personal data of a principal", Vec::new()),
    };
    let content = match asked {
        Asked::Export => json!({"application/x-ndjson": {"schema": {"type": "string"}}}),
        _ => json!({"application/json": {"schema": {"type": "object", "additionalProperties": true}}}),
    };
    let mut parameters = vec![parameter("RegionOrGlobal")];
    if in_organization {
        parameters.push(parameter("Organization"));
    }
    parameters.extend(more);
    let problems: &[&str] = if asked == Asked::Forget { &["403", "409", "413", "415", "422"] } else { &["403"] };
    let responses = answers(vec![("200", success("Done", content, &[]))], problems);
    let (id, about) = match in_organization {
        true => (format!("{id}OfOrganization"), format!("{about}, for one organization")),
        false => (id.to_owned(), about.to_owned()),
    };
    let mut operation = operation(&id, "audit", &about, parameters, responses);
    let method = if asked == Asked::Forget { "post" } else { "get" };
    if asked == Asked::Forget {
        let principal = json!({"type": "string", "minLength": 1, "maxLength": MAX_FILTER});
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["principal"],
            "properties": {"principal": principal},
        });
        let content = json!({"application/json": {"schema": schema, "example": {"principal": "user:default/ada"}}});
        operation["requestBody"] = json!({"required": true, "content": content});
    }
    json!({method: operation})
}
