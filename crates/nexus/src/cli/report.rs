//! How a command's failure is told: what happened, which fields are at fault, and the request's id.

use serde_json::Value;

use crate::client::ClientError;
use crate::exit;

/// Prints an error and answers the exit code. A reader that went away (`nexus get apps | head -1`) is no error.
pub fn print(error: &anyhow::Error) -> i32 {
    if error.chain().any(|e| e.downcast_ref::<super::output::Closed>().is_some()) {
        return 0;
    }
    super::output::note(&text(error));
    exit::code_of(error)
}

/// `error: title: detail`, then a line for each field and one for the request's id.
fn text(error: &anyhow::Error) -> String {
    let document = error
        .chain()
        .find_map(|e| e.downcast_ref::<ClientError>().and_then(ClientError::problem).and_then(|p| p.document.as_ref()));
    let Some(document) = document else { return format!("error: {error:#}") };
    let mut text = String::from("error: ");
    // What the command was about, if it said so.
    for context in error.chain().take_while(|e| e.downcast_ref::<ClientError>().is_none()) {
        text.push_str(&format!("{context}: "));
    }
    text.push_str(&problem(document));
    text
}

/// A problem document (RFC 9457) as text.
pub fn problem(document: &Value) -> String {
    let part = |key: &str| document[key].as_str().filter(|t| !t.is_empty());
    let fields = document["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
    // With several fields, the detail says the same in one line.
    let detail = if fields.is_empty() { part("detail") } else { None };
    let mut text = match (part("title"), detail) {
        (Some(title), Some(detail)) => format!("{title}: {detail}"),
        (Some(one), None) | (None, Some(one)) => one.to_owned(),
        // The token endpoint's refusals have another form (RFC 6749, section 5.2).
        (None, None) => part("error_description").unwrap_or("the API refused").to_owned(),
    };
    for field in fields {
        let part = |key: &str| field[key].as_str().unwrap_or("?");
        text.push_str(&format!("\n  {}: {}", part("field"), part("message")));
    }
    if let Some(id) = part("requestId") {
        text.push_str(&format!("\n  request {id}"));
    }
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use reqwest::StatusCode;
    use serde_json::json;

    use super::*;
    use crate::client::Problem;

    fn refused(document: Value) -> ClientError {
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        ClientError::Refused(Box::new(Problem { status, document: Some(document), text: String::new() }))
    }

    #[test]
    fn a_refusal_is_told_with_its_fields_and_request() {
        let document = json!({
            "title": "The object is not valid", "detail": "spec.image: x", "requestId": "req-1",
            "errors": [{"field": "spec.image", "message": "x"}],
        });
        let error = Err::<(), _>(refused(document)).context("app web").unwrap_err();
        assert_eq!(text(&error), "error: app web: The object is not valid\n  spec.image: x\n  request req-1");
        let error = refused(json!({"title": "Not found", "detail": "there is no App \"x\""})).into();
        assert_eq!(text(&error), "error: Not found: there is no App \"x\"");
        let error = refused(json!({"error": "invalid_grant", "error_description": "it was used"})).into();
        assert_eq!(text(&error), "error: it was used");
    }

    #[test]
    fn another_error_is_told_with_its_causes() {
        let error = Err::<(), _>(anyhow::anyhow!("inner")).context("outer").unwrap_err();
        assert_eq!(text(&error), "error: outer: inner");
    }
}
