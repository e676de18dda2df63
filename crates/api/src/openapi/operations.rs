//! Paths and operations, and the parameters, headers and responses that they share.

use nexus_model::kind::{self, GLOBAL, Home, KindDescriptor, MAX_URL, Scope, URL_PATTERN};
use nexus_model::{API_VERSION, Code, Digest, Name};
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::input::MAX_INTEGER;
use crate::list::{DEFAULT_LIMIT, MAX_LIMIT};
use crate::route::{BLOB_TEMPLATE, DISCOVERY, KEYS, PROVIDERS, PULL_TEMPLATE, SCALE, SIGN_IN, collection_template};
use crate::scaling::ScaleRequest;
use crate::streams::MAX_TAIL;

/// The name that examples give to an object.
const EXAMPLE: &str = "example";
const SELECTOR: &str = r"^(|!?K|K(=|==|!=)V)(,(|!?K|K(=|==|!=)V)){0,31}$";

fn selector_pattern() -> String {
    SELECTOR.replace('K', r"([A-Za-z0-9._-]{1,64}/)?[A-Za-z0-9._-]{1,63}").replace('V', "[A-Za-z0-9._-]{0,63}")
}

pub(super) fn tags() -> Value {
    let kinds = kind::all().iter().map(|d| json!({"name": d.plural, "description": d.about}));
    let more = [
        json!({"name": "audit", "description": "What was done, so that it can be proven."}),
        json!({"name": "blobs", "description": "The content of images, by digest."}),
        json!({"name": "operations", "description": "What operators do to the fleet itself."}),
        json!({"name": "server", "description": "The server and the cluster themselves."}),
    ];
    kinds.chain(more).collect()
}

pub(super) fn parameter(name: &str) -> Value {
    json!({"$ref": format!("#/components/parameters/{name}")})
}

fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

pub(super) fn parameters(region: &Name) -> Value {
    let name = json!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": Name::PATTERN});
    let query = |name: &str, about: &str, schema: Value| json!({"name": name, "in": "query", "description": about, "schema": schema});
    let header = |name: &str, about: &str, schema: Value| json!({"name": name, "in": "header", "description": about, "schema": schema});
    json!({
        "Region": {
            "name": "region", "in": "path", "required": true, "example": region,
            "schema": {"type": "string", "enum": [region]},
            "description": "The region that this server serves. Another region's path is passed on to it.",
        },
        "RegionOrGlobal": {
            "name": "region", "in": "path", "required": true, "example": region,
            "schema": {"type": "string", "enum": [region, GLOBAL]},
            "description": "The region that this server serves, or `global`: what all regions share. Another region's \
                path is passed on to it.",
        },
        "Project": {"name": "project", "in": "path", "required": true, "example": "default", "schema": name},
        "Organization": {
            "name": "organization", "in": "path", "required": true, "example": "default", "schema": name,
        },
        "Name": {"name": "name", "in": "path", "required": true, "example": EXAMPLE, "schema": name},
        "RegionName": {"name": "name", "in": "path", "required": true, "example": region, "schema": name},
        "Digest": {
            "name": "digest", "in": "path", "required": true, "example": Digest::of(b""),
            "schema": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        },
        "Limit": query(
            "limit",
            "The most objects to answer. A page may hold fewer although there are more: the cursor tells.",
            json!({"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}),
        ),
        "Cursor": query(
            "cursor",
            "Goes on after a page; belongs to the list, selector and `deleting` that gave it.",
            json!({"type": "string", "pattern": "^[A-Za-z0-9_-]{12,512}$"}),
        ),
        "Labels": query(
            "labels",
            "A label selector: `key=value`, `key!=value`, `key`, `!key`, joined by commas; all must hold.",
            json!({"type": "string", "maxLength": 4096, "pattern": selector_pattern()}),
        ),
        "Deleting": query(
            "deleting",
            "Also lists what has been deleted and is still being torn down.",
            json!({"type": "boolean", "default": false}),
        ),
        "Consistency": query(
            "consistency",
            "`stale` answers from what this server knows, without a majority; `X-Cnx-Stale-Ms` says how long ago that was \
             last known to be complete.",
            json!({"type": "string", "enum": ["linearizable", "stale"], "default": "linearizable"}),
        ),
        "DryRun": query(
            "dryRun",
            "Decides everything and commits nothing.",
            json!({"type": "boolean", "default": false}),
        ),
        "IfMatch": header(
            "If-Match",
            "The revision that the object must have, or `*`: it must exist.",
            json!({"type": "string", "pattern": r#"^("[0-9]{1,15}"|\*)$"#}),
        ),
        "IfNoneMatch": header(
            "If-None-Match",
            "Answers 304 when the object still has this revision.",
            json!({"type": "string", "pattern": r#"^((W/)?"[0-9]{1,15}"|\*)$"#}),
        ),
        "OnlyNew": header(
            "If-None-Match",
            "`*`: create, don't replace.",
            json!({"type": "string", "const": "*"}),
        ),
        "IdempotencyKey": header(
            "Idempotency-Key",
            "A retry with the same key and the same request is given the first answer.",
            json!({"type": "string", "pattern": "^[!-~]{1,128}$"}),
        ),
        "Prefer": header(
            "Prefer",
            "`wait=N`: answer when the object has settled, or after N seconds (at most 300). See RFC 7240.",
            json!({"type": "string", "examples": ["wait=1"]}),
        ),
        "Callback": header(
            "Callback",
            "Where to tell, as a signed CloudEvent, that the object has settled. Only addresses of the public internet are \
             reached, and those that the operator allows.",
            json!({"type": "string", "maxLength": MAX_URL, "pattern": URL_PATTERN}),
        ),
        "CallbackSecret": header(
            "Callback-Secret",
            "The secret of the project that signs the callback, as NAME or NAME/KEY.",
            json!({
                "type": "string", "default": "callbacks/key", "maxLength": 192,
                "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$",
            }),
        ),
        "RequestId": header(
            "X-Request-Id",
            "Names the request in answers, events and logs. One that is not well-formed is replaced.",
            json!({"type": "string"}),
        ),
    })
}

pub(super) fn headers() -> Value {
    json!({
        "RequestId": {"required": true, "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}},
        "ETag": {
            "required": true, "description": "The object's revision.",
            "schema": {"type": "string", "pattern": "^\"[0-9]+\"$"},
        },
        "Tag": {"required": true, "schema": {"type": "string"}},
        "Location": {"required": true, "description": "The new object's path.", "schema": {"type": "string"}},
        "Challenge": {"required": true, "schema": {"type": "string", "pattern": "^Bearer"}},
        "RetryAfter": {"required": true, "schema": {"type": "integer", "minimum": 0}},
        "Replayed": {
            "description": "Present when this is the first answer again.", "schema": {"type": "string", "const": "true"},
        },
        "PreferenceApplied": {"schema": {"type": "string", "pattern": "^wait=[0-9]{1,3}$"}},
        "Settled": {
            "description": "With `Prefer: wait`: whether the object had settled.",
            "schema": {"type": "string", "enum": ["true", "false"]},
        },
    })
}

fn header(name: &str) -> Value {
    json!({"$ref": format!("#/components/headers/{name}")})
}

/// A success with its body and headers.
pub(super) fn success(about: &str, content: Value, more: &[(&str, &str)]) -> Value {
    let mut headers = Map::new();
    headers.insert("X-Request-Id".into(), header("RequestId"));
    headers.extend(more.iter().map(|(name, component)| ((*name).to_owned(), header(component))));
    let mut out = json!({"description": about, "headers": headers});
    if !content.is_null() {
        out["content"] = content;
    }
    out
}

pub(super) fn as_json(name: &str) -> Value {
    json!({"application/json": {"schema": schema(name)}})
}

fn as_text() -> Value {
    json!({"text/plain": {"schema": {"type": "string"}}})
}

const PROBLEMS: [(&str, Code, &str); 14] = [
    ("400", Code::BadRequest, "The request can't be read"),
    ("401", Code::Unauthenticated, "No token, or one that is not known"),
    ("403", Code::Forbidden, "Not allowed, or over quota"),
    ("404", Code::NotFound, "No such object"),
    ("409", Code::Conflict, "The name is taken, or the object's state forbids it"),
    ("410", Code::Compacted, "That revision is no longer kept"),
    ("412", Code::PreconditionFailed, "The object has changed"),
    ("413", Code::TooLarge, "Too large"),
    ("415", Code::UnsupportedMediaType, "Not a media type that is understood here"),
    ("422", Code::Invalid, "Well-formed, but not valid"),
    ("429", Code::Overloaded, "Too many requests at once"),
    ("500", Code::Internal, "A defect of the server"),
    ("503", Code::Unavailable, "The control plane can't answer now; the same request may be sent again"),
    ("504", Code::Timeout, "The deadline passed"),
];

pub(super) fn responses() -> Value {
    let mut out = Map::new();
    for (status, code, about) in PROBLEMS {
        debug_assert_eq!(status, code.http_status().to_string());
        let more: &[(&str, &str)] = match code {
            Code::Unauthenticated => &[("WWW-Authenticate", "Challenge")],
            Code::Overloaded | Code::Unavailable => &[("Retry-After", "RetryAfter")],
            _ => &[],
        };
        let content = json!({"application/problem+json": {"schema": schema("Problem")}});
        out.insert(format!("Problem{status}"), success(about, content, more));
    }
    let content = json!({"application/problem+json": {"schema": schema("Problem")}});
    out.insert("Problem".into(), success("Any other error", content, &[]));
    out.insert("NotModified".into(), success("Still the same", Value::Null, &[("ETag", "Tag")]));
    Value::Object(out)
}

/// What any operation may answer, and what this one does.
pub(super) fn answers(good: Vec<(&str, Value)>, problems: &[&str]) -> Value {
    let mut out: Map<String, Value> = good.into_iter().map(|(s, r)| (s.to_owned(), r)).collect();
    for status in ["400", "401", "404"].iter().chain(problems).chain(&["429", "500", "503", "504"]) {
        out.insert((*status).to_owned(), json!({"$ref": format!("#/components/responses/Problem{status}")}));
    }
    out.insert("default".into(), json!({"$ref": "#/components/responses/Problem"}));
    Value::Object(out)
}

pub(super) fn operation(id: &str, tag: &str, summary: &str, parameters: Vec<Value>, responses: Value) -> Value {
    let mut parameters = parameters;
    parameters.push(parameter("RequestId"));
    json!({"operationId": id, "tags": [tag], "summary": summary, "parameters": parameters, "responses": responses})
}

pub(super) fn place(d: &KindDescriptor, in_project: bool) -> Vec<Value> {
    match d.scope {
        Scope::Global => Vec::new(),
        Scope::Project if in_project => vec![region_parameter(d), parameter("Project")],
        Scope::Region | Scope::Project => vec![region_parameter(d)],
        Scope::Organization => vec![parameter("Organization")],
    }
}

fn region_parameter(d: &KindDescriptor) -> Value {
    parameter(if d.home == Home::Region { "Region" } else { "RegionOrGlobal" })
}

pub(super) fn name_parameter(d: &KindDescriptor) -> Value {
    parameter(if d.kind == "Region" { "RegionName" } else { "Name" })
}

fn list_operation(d: &KindDescriptor, in_project: bool) -> Value {
    let mut parameters = place(d, in_project);
    parameters.extend(["Limit", "Cursor", "Labels", "Deleting", "Consistency"].map(parameter));
    let good = success("A page", as_json(&format!("{}List", d.kind)), &[]);
    let all = if !in_project && d.scope == Scope::Project { " of all projects" } else { "" };
    let id = if all.is_empty() { format!("list{}s", d.kind) } else { format!("listAll{}s", d.kind) };
    let mut out = operation(
        &id,
        d.plural,
        &format!("List {}{all}", d.plural),
        parameters,
        answers(vec![("200", good)], &["410"]),
    );
    out["x-stream-parameters"] = json!([{
        "name": "watch", "in": "query", "schema": {"type": "string", "pattern": "^[0-9]*$"},
        "description": "Sends every change after this revision as server-sent events; 0 or nothing begins now. Events are \
            `put`, `delete`, `bookmark` and `error`; `id` is the revision to go on from, also by `Last-Event-ID`.",
    }]);
    out
}

/// What a change of what is in a project takes beside.
fn callback(d: &KindDescriptor) -> Vec<Value> {
    let some = d.scope == Scope::Project;
    ["Callback", "CallbackSecret"].into_iter().filter(|_| some).map(parameter).collect()
}

fn body(content: &[(&str, &str)], example: &Value) -> Value {
    let content: Map<_, _> = content
        .iter()
        .map(|(media, name)| {
            ((*media).to_owned(), json!({"schema": schema(name), "examples": {"example": {"value": example}}}))
        })
        .collect();
    json!({"required": true, "content": content})
}

pub(super) const CHANGED: &[(&str, &str)] = &[
    ("ETag", "ETag"),
    ("Idempotency-Replayed", "Replayed"),
    ("Preference-Applied", "PreferenceApplied"),
    ("X-Cnx-Settled", "Settled"),
];
const CREATED: &[(&str, &str)] = &[
    ("ETag", "ETag"),
    ("Location", "Location"),
    ("Idempotency-Replayed", "Replayed"),
    ("Preference-Applied", "PreferenceApplied"),
    ("X-Cnx-Settled", "Settled"),
];

fn collection(d: &KindDescriptor) -> Value {
    let mut out = json!({"get": list_operation(d, true)});
    if d.verbs.create {
        let mut parameters = place(d, true);
        parameters.extend(["DryRun", "IdempotencyKey", "Prefer"].map(parameter));
        parameters.extend(callback(d));
        let good = vec![
            ("201", success("Created", as_json(d.kind), CREATED)),
            ("200", success("A dry run's result", as_json(d.kind), CHANGED)),
        ];
        let responses = answers(good, &["403", "409", "413", "415", "422"]);
        let mut post =
            operation(&format!("create{}", d.kind), d.plural, &format!("Create {}", d.kind), parameters, responses);
        let example = json!({
            "apiVersion": API_VERSION, "kind": d.kind, "metadata": {"name": EXAMPLE}, "spec": (d.example)(),
        });
        post["requestBody"] = body(&[("application/json", &format!("{}Input", d.kind))], &example);
        out["post"] = post;
    }
    out
}

fn object(d: &KindDescriptor) -> Value {
    let here = |more: &[&str]| {
        let mut parameters = place(d, true);
        parameters.push(name_parameter(d));
        parameters.extend(more.iter().map(|p| parameter(p)));
        parameters
    };
    let ok = || ("200", success("The object", as_json(d.kind), &[("ETag", "ETag")]));
    let not_modified = ("304", json!({"$ref": "#/components/responses/NotModified"}));
    let get = answers(vec![ok(), not_modified], &[]);
    let get = operation(
        &format!("get{}", d.kind),
        d.plural,
        &format!("Get {}", d.kind),
        here(&["Consistency", "IfNoneMatch"]),
        get,
    );
    let mut out = json!({"get": get});
    let changed = || ("200", success("The object as it is now", as_json(d.kind), CHANGED));
    if d.verbs.update {
        let mut good = vec![changed()];
        if d.verbs.create {
            good.push(("201", success("Created", as_json(d.kind), CREATED)));
        }
        let mut more = vec!["DryRun", "IdempotencyKey", "Prefer", "IfMatch"];
        let summary = if d.verbs.create { "Create or replace" } else { "Replace" };
        if d.verbs.create {
            more.push("OnlyNew");
        }
        let responses = answers(good, &["403", "409", "412", "413", "415", "422"]);
        let mut parameters = here(&more);
        parameters.extend(callback(d));
        let mut put =
            operation(&format!("put{}", d.kind), d.plural, &format!("{summary} {}", d.kind), parameters, responses);
        let example = json!({"spec": (d.example)()});
        put["requestBody"] = body(&[("application/json", &format!("{}Replacement", d.kind))], &example);
        out["put"] = put;
        let responses = answers(vec![changed()], &["403", "409", "412", "413", "415", "422"]);
        let mut parameters = here(&["DryRun", "IdempotencyKey", "Prefer", "IfMatch"]);
        parameters.extend(callback(d));
        let mut patch =
            operation(&format!("patch{}", d.kind), d.plural, &format!("Change {}", d.kind), parameters, responses);
        let name = format!("{}Patch", d.kind);
        let example = json!({"metadata": {"labels": {"tier": "front"}}});
        patch["requestBody"] = body(&[("application/merge-patch+json", &name), ("application/json", &name)], &example);
        out["patch"] = patch;
    }
    if d.verbs.delete {
        let responses =
            answers(vec![("200", success("Its tombstone", as_json(d.kind), CHANGED))], &["403", "409", "412", "422"]);
        let mut parameters = here(&["DryRun", "IdempotencyKey", "Prefer", "IfMatch"]);
        parameters.extend(callback(d));
        out["delete"] =
            operation(&format!("delete{}", d.kind), d.plural, &format!("Delete {}", d.kind), parameters, responses);
    }
    out
}

fn server_paths(paths: &mut Map<String, Value>) {
    let mut add = |path: &str, id: &str, summary: &str, content: Value, more: &[(&str, &str)], statuses: &[&str]| {
        let mut responses = Map::new();
        responses.insert("200".into(), success(summary, content, more));
        for status in statuses {
            responses.insert((*status).into(), json!({"$ref": format!("#/components/responses/Problem{status}")}));
        }
        responses.insert("default".into(), json!({"$ref": "#/components/responses/Problem"}));
        let mut get = operation(id, "server", summary, Vec::new(), Value::Object(responses));
        if !statuses.contains(&"401") {
            get["security"] = json!([]);
        }
        paths.insert(path.into(), json!({"get": get}));
    };
    add("/healthz", "health", "The process answers", as_text(), &[], &[]);
    add("/readyz", "ready", "The server can serve", as_text(), &[], &["503"]);
    let metrics = json!({"application/openmetrics-text": {"schema": {"type": "string"}}});
    add("/metrics", "metrics", "Figures for Prometheus", metrics, &[], &[]);
    let any = json!({"application/json": {"schema": {"type": "object", "additionalProperties": true}}});
    add("/v1/openapi.json", "openapi", "This document", any, &[("ETag", "Tag")], &["400"]);
    let status = as_json("ClusterStatus");
    let known = ["400", "401", "429", "500", "503", "504"];
    add("/v1/status", "status", "How the cluster does", status, &[], &known);
    let any = || json!({"application/json": {"schema": {"type": "object", "additionalProperties": true}}});
    add("/v1/whoami", "whoAmI", "Who asks, by what, and with which roles", any(), &[], &known);
    add(
        "/v1/policy-schema",
        "getPolicySchema",
        "The Cedar schema that policies are held against",
        as_text(),
        &[],
        &known,
    );
    add(DISCOVERY, "discovery", "What others need to check access tokens", any(), &[], &["400"]);
    add(KEYS, "keys", "The keys that sign access tokens, as a JWK set", any(), &[], &["400"]);
}

/// What a question or an order that is no kind's takes: a closed object of these properties.
fn asked(properties: &Value, required: &[&str]) -> Value {
    let schema =
        json!({"type": "object", "additionalProperties": false, "properties": properties, "required": required});
    json!({"required": true, "content": {"application/json": {"schema": schema}}})
}

fn identity_paths(paths: &mut Map<String, Value>) {
    let any = || json!({"application/json": {"schema": {"type": "object", "additionalProperties": true}}});
    let text = |most: u32| json!({"type": "string", "minLength": 1, "maxLength": most});
    let name = || json!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": Name::PATTERN});
    let statuses = ["403", "404", "409", "413", "415", "422"];

    let responses = answers(vec![("200", success("Whether, and why", any(), &[]))], &statuses);
    let mut can = operation("can", "server", "Whether somebody may do something", Vec::new(), responses);
    let labels = json!({"type": "object", "additionalProperties": {"type": "string"}});
    can["requestBody"] = asked(
        &json!({
            "verb": text(64), "kind": text(64), "name": name(), "organization": name(), "project": name(),
            "region": name(), "labels": labels, "user": text(127), "explain": {"type": "boolean"},
        }),
        &["verb", "kind"],
    );
    paths.insert("/v1/can".into(), json!({"post": can}));

    let mut responses = Map::new();
    responses.insert("200".into(), success("Tokens and their session", any(), &[]));
    responses.insert("default".into(), success("Why not, as RFC 6749 says it", any(), &[]));
    let mut token = operation("token", "server", "Sign in, or refresh", Vec::new(), Value::Object(responses));
    let form = json!({"type": "object", "additionalProperties": false, "required": ["grant_type"], "properties": {
        "grant_type": text(64), "username": text(127), "password": text(1024), "refresh_token": text(256),
        "invitation": text(64), "otp": text(32), "client_id": text(64), "client_secret": text(64),
        "organization": name(), "provider": name(), "code": text(4096), "code_verifier": text(128),
        "redirect_uri": text(2048), "nonce": text(4096), "subject_token": text(32768), "subject_token_type": text(64),
        "requested_token_type": text(64),
    }});
    token["requestBody"] =
        json!({"required": true, "content": {"application/x-www-form-urlencoded": {"schema": form}}});
    token["security"] = json!([]);
    paths.insert(SIGN_IN.into(), json!({"post": token}));

    let about = "By which identity providers people of an organization sign in";
    let organization = json!({"name": "organization", "in": "query", "required": true, "schema": name()});
    let responses = json!({
        "200": success("The providers; none of an organization that is not there", any(), &[]),
        "400": {"$ref": "#/components/responses/Problem400"},
        "default": {"$ref": "#/components/responses/Problem"},
    });
    let mut providers = operation("signInProviders", "server", about, vec![organization], responses);
    providers["security"] = json!([]);
    paths.insert(PROVIDERS.into(), json!({"get": providers}));

    let users = kind::find("users").expect("a kind");
    let path = format!("{}/{{name}}", collection_template(users, true));
    let here = || {
        let mut parameters = place(users, true);
        parameters.push(name_parameter(users));
        parameters
    };
    let responses = || answers(vec![("200", success("Done", any(), &[]))], &statuses);
    let about = "Change a user's own password, which ends their other sessions";
    let mut password = operation("setPassword", users.plural, about, here(), responses());
    password["requestBody"] = asked(&json!({"old": text(1024), "new": text(1024)}), &["old", "new"]);
    paths.insert(format!("{path}:set-password"), json!({"post": password}));
    let about = "Begin a second factor: the secret for an authenticator, and recovery codes";
    let enroll = operation("enrollTotp", users.plural, about, here(), responses());
    paths.insert(format!("{path}:enroll-totp"), json!({"post": enroll}));
    let mut confirm = operation("confirmTotp", users.plural, "Show that one can make codes", here(), responses());
    confirm["requestBody"] = asked(&json!({"code": text(32)}), &["code"]);
    paths.insert(format!("{path}:confirm-totp"), json!({"post": confirm}));
    let about = "Make an invitation, by which a user sets a first or new password";
    let invite = operation("inviteUser", users.plural, about, here(), responses());
    paths.insert(format!("{path}:invite"), json!({"post": invite}));
}

/// The one path that answers the values of a secret.
fn reveal_path(secrets: &KindDescriptor) -> Value {
    let values = || json!({"type": "object", "additionalProperties": {"type": "string"}});
    let version = json!({"type": "integer", "minimum": 1, "maximum": MAX_INTEGER});
    let body = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "version", "created", "data", "binary"],
        "properties": {
            "name": {"type": "string"}, "version": version, "created": {"type": "string"},
            "data": values(), "binary": values(),
        },
    });
    let found =
        success("The values, in base64 those that are no text", json!({"application/json": {"schema": body}}), &[]);
    let mut parameters = place(secrets, true);
    parameters.push(name_parameter(secrets));
    parameters.push(json!({
        "name": "version", "in": "query", "schema": version, "description": "The newest, without it.",
    }));
    let about = "Read the values of a secret, which needs the permission `secrets:reveal` and leaves a record";
    json!({"get": operation("revealSecret", secrets.plural, about, parameters, answers(vec![("200", found)], &["403", "404"]))})
}

fn load_path(apps: &KindDescriptor) -> Value {
    let numbers = json!({"type": "array", "items": {"type": ["number", "null"], "minimum": 0}});
    let body = json!({
        "type": "object", "additionalProperties": false, "required": ["begins", "slotSeconds", "measures"],
        "properties": {
            "begins": {"type": "integer", "minimum": 0, "description": "When the first slot begins, in seconds since 1970."},
            "slotSeconds": {"type": "integer", "minimum": 1},
            "measures": {
                "type": "object", "additionalProperties": false, "required": ["cpu", "requests", "concurrency"],
                "properties": {"cpu": numbers.clone(), "requests": numbers.clone(), "concurrency": numbers},
            },
        },
    });
    let found = success("Means of slots, oldest first", json!({"application/json": {"schema": body}}), &[]);
    let mut parameters = place(apps, true);
    parameters.push(name_parameter(apps));
    let about =
        "What the load was of an app that the cloud scales, over two weeks at most and up to a quarter of an hour ago";
    json!({"get": operation("getAppLoad", apps.plural, about, parameters, answers(vec![("200", found)], &["403"]))})
}

fn scale_path() -> Value {
    let generator = SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true).into_generator();
    let schema = generator.into_root_schema_for::<ScaleRequest>();
    let mut schema = serde_json::to_value(schema).expect("schemas are plain data");
    if let Some(root) = schema.as_object_mut() {
        root.shift_remove("$schema");
        root.shift_remove("title");
    }
    let changed = ("200", success("The app as it is now", as_json("App"), CHANGED));
    let responses = answers(vec![changed], &["403", "409", "412", "413", "415", "422"]);
    let parameters = ["DryRun", "IdempotencyKey", "Prefer", "IfMatch"].map(parameter).to_vec();
    let mut post = operation("scaleApp", "apps", "Have an app scaled by the cloud", parameters, responses);
    let example = json!({"service": EXAMPLE, "strategy": "predictive", "threshold_cpu": 65, "max_replicas": 50});
    post["requestBody"] = json!({
        "required": true,
        "content": {"application/json": {"schema": schema, "examples": {"example": {"value": example}}}},
    });
    json!({"post": post})
}

/// A verb without a body that puts a delivery on its way.
fn telling_path(d: &KindDescriptor, id: &str, about: &str) -> Value {
    let mut parameters = place(d, true);
    parameters.push(name_parameter(d));
    parameters.push(parameter("IdempotencyKey"));
    let good = success("The delivery", as_json("Delivery"), &[("ETag", "ETag")]);
    json!({"post": operation(id, d.plural, about, parameters, answers(vec![("200", good)], &["403", "409", "413", "415", "422"]))})
}

fn blob_path() -> Value {
    let here = || vec![parameter("Region"), parameter("Project"), parameter("Digest")];
    let octets = json!({"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}});
    let found = |content| ("200", success("The blob", content, &[("ETag", "Tag")]));
    let get = answers(vec![found(octets.clone())], &["403"]);
    let head = answers(vec![found(Value::Null)], &["403"]);
    let receipt = |about, more: &[(&str, &str)]| success(about, as_json("BlobReceipt"), more);
    let put = answers(
        vec![
            ("201", receipt("Stored", &[("ETag", "Tag"), ("Location", "Location")])),
            ("200", receipt("It was there already", &[("ETag", "Tag")])),
        ],
        &["403", "409", "413", "422"],
    );
    let mut put = operation("putBlob", "blobs", "Upload a blob", here(), put);
    // No body is the empty blob.
    put["requestBody"] = json!({"required": false, "content": octets});
    json!({
        "get": operation("getBlob", "blobs", "Fetch a blob", here(), get),
        "head": operation("headBlob", "blobs", "Ask whether a blob is there", here(), head),
        "put": put,
    })
}

fn pull_path() -> Value {
    let lines = json!({"application/x-ndjson": {"schema": {"type": "string"}}});
    let about =
        "Lines of JSON, each an object with `found`, `blob`, `image`, `error` or nothing; the last is image or error";
    let good = success(about, lines, &[]);
    let responses = answers(vec![("200", good)], &["403", "404", "413", "415", "422"]);
    let about = "Pull an image from a registry, for an image to be written with it";
    let mut post = operation("pullImage", "blobs", about, vec![parameter("Region"), parameter("Project")], responses);
    let schema = crate::operations::schema::<crate::pull::PullRequest>();
    post["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
    json!({"post": post})
}

fn instance_paths(paths: &mut Map<String, Value>, d: &KindDescriptor) {
    let path = format!("{}/{{name}}", collection_template(d, true));
    let here = || {
        let mut parameters = place(d, true);
        parameters.push(name_parameter(d));
        parameters
    };
    let query = |name: &str, schema: Value| json!({"name": name, "in": "query", "schema": schema});
    let part = || {
        let schema = json!({"type": "string", "pattern": Name::PATTERN});
        let about = "An init step or sidecar of the instance; its main part, without it.";
        json!({"name": "part", "in": "query", "schema": schema, "description": about})
    };
    let mut parameters = here();
    parameters.push(query("tail", json!({"type": "integer", "minimum": 0, "maximum": MAX_TAIL})));
    parameters.push(query("stream", json!({"type": "string", "enum": ["stdout", "stderr"]})));
    parameters.push(part());
    let good = success("Its lines", as_text(), &[]);
    let responses = answers(vec![("200", good)], &["409"]);
    let mut logs = operation("getInstanceLogs", d.plural, "What an instance wrote", parameters, responses);
    logs["x-stream-parameters"] = json!([{
        "name": "follow", "in": "query", "schema": {"type": "boolean"}, "description": "Goes on with what is written next.",
    }]);
    paths.insert(format!("{path}:logs"), json!({"get": logs}));

    let mut parameters = here();
    let words = json!({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 256});
    parameters.push(json!({
        "name": "command", "in": "query", "required": true, "schema": words, "style": "form", "explode": true,
        "example": ["true"],
    }));
    parameters.push(query("stdin", json!({"type": "boolean"})));
    parameters.push(part());
    let switch = success("A WebSocket: each binary message is a channel's byte and data", Value::Null, &[]);
    let responses = answers(vec![("101", switch)], &["409"]);
    let exec = operation("execInInstance", d.plural, "Run a command in an instance", parameters, responses);
    paths.insert(format!("{path}:exec"), json!({"get": exec}));
}

fn operation_path(o: &crate::operations::Operation) -> Value {
    let answer = json!({"application/json": {"schema": {"type": "object", "additionalProperties": true}}});
    let responses = answers(vec![("200", success("Done", answer, &[]))], &["403", "409", "413", "415", "422"]);
    let mut post = operation(o.id, "operations", o.about, Vec::new(), responses);
    post["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": o.schema()}}});
    if o.open {
        post["security"] = json!([]);
    }
    json!({"post": post})
}

pub(super) fn paths() -> Map<String, Value> {
    let mut paths = Map::new();
    server_paths(&mut paths);
    identity_paths(&mut paths);
    for o in crate::operations::OPERATIONS {
        paths.insert(o.path(), operation_path(o));
    }
    for d in kind::all() {
        let list = collection_template(d, true);
        paths.insert(format!("{list}/{{name}}"), object(d));
        paths.insert(list.clone(), collection(d));
        if d.scope == Scope::Project {
            paths.insert(collection_template(d, false), json!({"get": list_operation(d, false)}));
        }
        super::networks::paths(&mut paths, d);
        if d.plural == "instances" {
            instance_paths(&mut paths, d);
        }
        if d.plural == "apps" {
            super::rollouts::paths(&mut paths, d);
        }
        if d.plural == "secrets" {
            paths.insert(format!("{}/{{name}}:reveal", collection_template(d, true)), reveal_path(d));
        }
        if d.plural == "webhooks" {
            let about = "Send a webhook something";
            paths.insert(format!("{list}/{{name}}:test"), telling_path(d, "testWebhook", about));
        }
        if d.plural == "deliveries" {
            let about = "Send a delivery again";
            paths.insert(format!("{list}/{{name}}:resend"), telling_path(d, "resendDelivery", about));
        }
    }
    let apps = kind::find("apps").expect("a kind");
    paths.insert(format!("{}/{{name}}:load", collection_template(apps, true)), load_path(apps));
    paths.insert(SCALE.into(), scale_path());
    paths.insert(BLOB_TEMPLATE.into(), blob_path());
    paths.insert(PULL_TEMPLATE.into(), pull_path());
    super::audit::paths(&mut paths);
    paths
}
