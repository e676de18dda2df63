//! The paths of what is ordered about an app's rollout.

use nexus_model::kind::KindDescriptor;
use serde_json::{Map, Value, json};

use super::operations::{CHANGED, answers, as_json, name_parameter, operation, parameter, place, success};
use crate::input::MAX_INTEGER;
use crate::route::collection_template;

const ORDERS: [(&str, &str, &str); 4] = [
    ("pause", "pauseRollout", "Hold up an app's rollout where it is"),
    (
        "resume",
        "resumeRollout",
        "Go on with an app's rollout: after a pause, to the next step, or again after a failure",
    ),
    ("promote", "promoteRollout", "Skip the steps of an app's rollout that are left"),
    ("undo", "undoRollout", "Bring back an app's template of a revision that is kept"),
];

pub(super) fn paths(paths: &mut Map<String, Value>, d: &KindDescriptor) {
    for (word, id, about) in ORDERS {
        let mut parameters = place(d, true);
        parameters.push(name_parameter(d));
        parameters.extend(["DryRun", "IdempotencyKey", "Prefer"].map(parameter));
        let good = vec![("200", success("The app as it is now", as_json(d.kind), CHANGED))];
        let responses = answers(good, &["403", "409", "413", "415", "422"]);
        let mut post = operation(id, d.plural, about, parameters, responses);
        if word == "undo" {
            let schema = json!({"type": "object", "additionalProperties": false, "properties": {"toRevision": {
                "type": "integer", "minimum": 1, "maximum": MAX_INTEGER,
                "description": "Without it, what served before. A revision that is not kept is answered with 404.",
            }}});
            post["requestBody"] = json!({"required": false, "content": {"application/json": {"schema": schema}}});
        }
        paths.insert(format!("{}/{{name}}:{word}", collection_template(d, true)), json!({"post": post}));
    }
}
