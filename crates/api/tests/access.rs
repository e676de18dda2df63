//! Who may do what over HTTP: every route against every kind of asker, and how others' things stay hidden.

mod support;

use http::StatusCode;
use nexus_iam::policy::PERSONAS;
use nexus_model::kind::{self, Scope};
use serde_json::{Value, json};
use support::Answer;
use support::cloud::{Cloud, EMPTY, object};

/// What an answer says of the asker's right.
fn verdict(answer: &Answer) -> &'static str {
    let detail = || answer.json()["detail"].as_str().unwrap_or_default().to_owned();
    match answer.status {
        StatusCode::UNAUTHORIZED => "401",
        StatusCode::FORBIDDEN if detail().contains(" may not `") => "no",
        // What a log does not have is no secret of anybody.
        StatusCode::NOT_FOUND if detail().contains("record") || detail().contains("kind") => "yes",
        StatusCode::NOT_FOUND => "hidden",
        _ => "yes",
    }
}

/// Every route of the API, as (method, path, body).
fn routes() -> Vec<(&'static str, String, Option<Value>)> {
    let mut routes = Vec::new();
    let mut add = |method: &'static str, path: &str, body: Option<Value>| routes.push((method, path.to_owned(), body));
    let open = ["/healthz", "/readyz", "/metrics", "/v1/openapi.json", "/.well-known/openid-configuration"];
    let known = ["/.well-known/jwks.json", "/v1/status", "/v1/whoami", "/v1/policy-schema"];
    open.iter().for_each(|path| add("GET", path, None));
    add("GET", "/oauth2/providers?organization=acme", None);
    known.iter().for_each(|path| add("GET", path, None));
    add("POST", "/v1/can", Some(json!({"verb": "list", "kind": "apps", "project": "shop"})));
    for operation in nexus_api::operations::OPERATIONS {
        add("POST", &operation.path(), Some(json!({})));
    }
    for asked in ["records", "export", "head", "heads", "keys", "inclusion?index=0&size=1", "consistency?from=0&to=0"] {
        add("GET", &format!("/v1/regions/local/audit/{asked}"), None);
        add("GET", &format!("/v1/regions/local/organizations/acme/audit/{asked}"), None);
    }
    add("POST", "/v1/regions/local/audit/forget", Some(json!({"principal": "user:acme/nobody"})));
    let blob = format!("/v1/regions/local/projects/shop/blobs/{EMPTY}");
    ["GET", "PUT"].iter().for_each(|method| add(method, &blob, None));
    let reference = json!({"reference": "registry.example/web:1"});
    add("POST", "/v1/regions/local/projects/shop/blobs:pull", Some(reference));
    for d in kind::all() {
        let base = match d.scope {
            Scope::Global => format!("/v1/{}", d.plural),
            Scope::Region => format!("/v1/regions/local/{}", d.plural),
            Scope::Project => format!("/v1/regions/local/projects/shop/{}", d.plural),
            Scope::Organization => format!("/v1/organizations/acme/{}", d.plural),
        };
        let name = match d.plural {
            "organizations" => "acme",
            "projects" => "shop",
            _ => "example",
        };
        let one = format!("{base}/{name}");
        let mut spec = (d.example)();
        if d.plural == "projects" {
            spec["organization"] = "acme".into();
        }
        add("GET", &base, None);
        if d.scope == Scope::Project {
            add("GET", &format!("/v1/regions/local/{}", d.plural), None);
        }
        add("GET", &one, None);
        let body = json!({"metadata": {"name": "fresh"}, "spec": spec});
        if d.verbs.create {
            add("POST", &format!("{base}?dryRun=true"), Some(body));
        }
        if d.verbs.update {
            add("PUT", &format!("{one}?dryRun=true"), Some(json!({"spec": spec})));
            add("PATCH", &format!("{one}?dryRun=true"), Some(json!({"metadata": {"labels": {"a": "b"}}})));
        }
        if d.verbs.delete {
            add("DELETE", &format!("{one}?dryRun=true"), None);
        }
        // Whoever may change an app may order its rollout about: these have no actions of their own.
        for verb in ["pause", "resume", "promote", "undo"].iter().filter(|_| d.plural == "apps") {
            add("POST", &format!("{one}:{verb}?dryRun=true"), None);
        }
        if d.plural == "networks" {
            add("GET", &format!("{one}:flows"), None);
        }
        for (_, verb) in nexus_iam::policy::VERBS.iter().filter(|v| v.0 == d.plural) {
            let body = match *verb {
                "set-password" => json!({"old": "something or other", "new": "something else then"}),
                "confirm-totp" => json!({"code": "000000"}),
                "invite" | "enroll-totp" | "test" | "resend" => json!({}),
                _ => {
                    add("GET", &format!("{one}:{verb}"), None);
                    continue;
                }
            };
            add("POST", &format!("{one}:{verb}"), Some(body));
        }
    }
    routes
}

/// Run with `UPDATE_GOLDEN=1` to write the file anew, and read what changed.
#[tokio::test]
async fn every_route_answers_everybody_as_the_golden_file_says() {
    let cloud = Cloud::new().await;
    let mut text = format!("{:<6} {:<64}", "", "");
    for persona in PERSONAS {
        text.push_str(&format!(" {persona:<12}"));
    }
    for (method, path, body) in routes() {
        let shown = path.replace("?dryRun=true", "");
        let shown = shown.split("/sha256:").next().unwrap();
        text = format!("{}\n{method:<6} {shown:<64}", text.trim_end());
        for persona in PERSONAS {
            let answer = cloud.call(persona, method, &path, body.clone()).await;
            assert!(answer.status != StatusCode::INTERNAL_SERVER_ERROR, "{persona} {method} {path}: {:?}", answer.body);
            text.push_str(&format!(" {:<12}", verdict(&answer)));
        }
    }
    let text = format!("{}\n", text.trim_end());
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/routes.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let new = text.lines().filter(|line| !expected.lines().any(|e| e == *line)).map(|line| format!("now: {line}"));
    let old = expected.lines().filter(|line| !text.lines().any(|t| t == *line)).map(|line| format!("was: {line}"));
    let changed: Vec<String> = old.chain(new).collect();
    let meant = "who may do what over HTTP changed; if that is meant, run again with UPDATE_GOLDEN=1";
    assert!(text == expected, "{meant}\n{}", changed.join("\n"));
}

/// The answer without what differs between any two requests.
fn bare(answer: &Answer) -> (StatusCode, Value) {
    let mut body = answer.json();
    body["requestId"] = Value::Null;
    (answer.status, body)
}

#[tokio::test]
async fn what_is_anothers_looks_like_what_is_not_there() {
    let cloud = Cloud::new().await;
    let renamed = |answer: &Answer, from: &str| {
        let (status, body) = bare(answer);
        (status, body.to_string().replace(from, "NAME"))
    };
    let app = json!({"metadata": {"name": "x"}, "spec": {"image": "x"}});
    for rest in ["apps", "apps/example", "apps?watch=0", "instances/example:logs", "instances/example:exec", "usages"] {
        let path = |project: &str| format!("/v1/regions/local/projects/{project}/{rest}");
        let theirs = cloud.call("viewer", "GET", &path("lab"), None).await;
        let nobodys = cloud.call("viewer", "GET", &path("ghost"), None).await;
        assert_eq!(renamed(&theirs, "lab"), renamed(&nobodys, "ghost"), "{rest}");
        assert_eq!(theirs.status, StatusCode::NOT_FOUND, "{rest}");
    }
    for (method, rest, body) in [
        ("POST", "apps", Some(app.clone())),
        ("PUT", "apps/example", Some(json!({"spec": {"image": "x"}}))),
        ("PATCH", "apps/example", Some(json!({"spec": {}}))),
        ("DELETE", "apps/example", None),
    ] {
        let path = |project: &str| format!("/v1/regions/local/projects/{project}/{rest}");
        let theirs = cloud.call("owner", method, &path("lab"), body.clone()).await;
        let nobodys = cloud.call("owner", method, &path("ghost"), body).await;
        assert_eq!(renamed(&theirs, "lab"), renamed(&nobodys, "ghost"), "{method} {rest}");
        assert_eq!(theirs.status, StatusCode::NOT_FOUND, "{method} {rest}");
    }
    for path in ["/v1/organizations/NAME", "/v1/organizations/NAME/users", "/v1/organizations/NAME/users/example"] {
        let theirs = cloud.call("owner", "GET", &path.replace("NAME", "globex"), None).await;
        let nobodys = cloud.call("owner", "GET", &path.replace("NAME", "ghost"), None).await;
        assert_eq!(renamed(&theirs, "globex"), renamed(&nobodys, "ghost"), "{path}");
    }
    // Nor does a project of theirs as the subject of a question or a create tell anything.
    let ask = |project: &str| json!({"verb": "list", "kind": "apps", "project": project});
    let theirs = cloud.call("owner", "POST", "/v1/can", Some(ask("lab"))).await;
    let nobodys = cloud.call("owner", "POST", "/v1/can", Some(ask("ghost"))).await;
    assert_eq!(renamed(&theirs, "lab"), renamed(&nobodys, "ghost"));
    let make = |organization: &str| json!({"metadata": {"name": "new"}, "spec": {"organization": organization}});
    let theirs = cloud.call("owner", "POST", "/v1/projects", Some(make("globex"))).await;
    let nobodys = cloud.call("owner", "POST", "/v1/projects", Some(make("ghost"))).await;
    assert_eq!(renamed(&theirs, "globex"), renamed(&nobodys, "ghost"));
}

#[tokio::test]
async fn tricks_with_paths_lead_nowhere() {
    let cloud = Cloud::new().await;
    let tricks = [
        "/v1/regions/local/projects/shop/../lab/apps",
        "/v1/regions/local/projects/shop/apps/../../lab/apps/example",
        "/v1/regions/local/projects/shop%2F..%2Flab/apps",
        "/v1/regions/local/projects/shop%2f..%2flab/apps/example",
        "/v1/regions/local/projects/%6cab/apps/example",
        "/v1/regions/local/projects/l\u{430}b/apps/example",
        "/v1/regions/local/projects/LAB/apps/example",
        "/v1/regions/local/projects/lab%00/apps/example",
        "/v1/regions/local/projects//lab/apps/example",
        "/v1/regions/local/projects/shop/apps/..%2f..%2flab%2fapps%2fexample",
        "/v1/organizations/acme/../globex/users",
        "/v1/organizations/acme%2f..%2fglobex/users",
    ];
    for trick in tricks {
        let path: String = trick.chars().map(|c| if c.is_ascii() { c.to_string() } else { "%D0%B0".into() }).collect();
        let answer = cloud.call("owner", "GET", &path, None).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{trick}: {:?}", answer.body);
    }
}

#[tokio::test]
async fn lists_over_everything_show_what_the_caller_may_see() {
    let cloud = Cloud::new().await;
    let names = async |who: &str, path: &str| -> Vec<String> {
        let list = cloud.call(who, "GET", path, None).await.json();
        let items = list["items"].as_array().unwrap_or_else(|| panic!("{list}")).clone();
        items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("viewer", "/v1/projects").await, ["shop"]);
    assert_eq!(names("other-tenant", "/v1/projects").await, ["lab"]);
    assert_eq!(names("operator", "/v1/projects").await, ["lab", "shop"]);
    assert_eq!(names("viewer", "/v1/organizations").await, ["acme"]);
    assert_eq!(names("operator", "/v1/organizations").await, ["acme", "globex", "system"]);
    // Of credentials, everybody sees their own; who administers the organization, all.
    assert_eq!(names("viewer", "/v1/organizations/acme/tokens").await, ["t-viewer"]);
    assert!(names("admin", "/v1/organizations/acme/tokens").await.len() > 5);
    // Selectors don't reach further.
    assert_eq!(names("viewer", "/v1/projects?labels=!a").await, ["shop"]);
    let all = cloud.call("viewer", "GET", "/v1/regions/local/apps?labels=!a", None).await;
    assert_eq!(all.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_token_of_one_project_opens_nothing_else() {
    let cloud = Cloud::new().await;
    let spec = json!({"project": "shop"});
    let body = json!({"metadata": {"name": "narrow"}, "spec": spec});
    let made = cloud.call("owner", "POST", "/v1/organizations/acme/tokens", Some(body)).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    let token = made.json()["status"]["token"].as_str().unwrap().to_owned();
    assert_eq!(made.json()["spec"]["holder"], json!({"kind": "User", "name": "owner"}));
    let call = async |path: &str| {
        let request = http::Request::get(path).header("authorization", format!("Bearer {token}"));
        cloud.world.send(request.body(String::new().into()).unwrap()).await.status
    };
    assert_eq!(call("/v1/regions/local/projects/shop/apps").await, StatusCode::OK);
    assert_eq!(call("/v1/organizations/acme/users").await, StatusCode::FORBIDDEN);
    assert_eq!(call("/v1/projects/shop").await, StatusCode::OK);
    // The text is in no later answer.
    let got = cloud.call("owner", "GET", "/v1/organizations/acme/tokens/narrow", None).await;
    assert_eq!(got.status, StatusCode::OK);
    assert!(!String::from_utf8_lossy(&got.body).contains(&token));
    // Revoked, it opens nothing.
    let gone = cloud.call("owner", "DELETE", "/v1/organizations/acme/tokens/narrow", None).await;
    assert_eq!(gone.status, StatusCode::OK);
    support::eventually(async || call("/v1/regions/local/projects/shop/apps").await == StatusCode::UNAUTHORIZED).await;
}

#[tokio::test]
async fn a_label_is_no_way_around_a_policy() {
    let cloud = Cloud::new().await;
    let text = "forbid (principal, action in [Action::\"edit\"], resource)\n\
                when { resource.hasTag(\"env\") && resource.getTag(\"env\") == \"prod\" };";
    let policy = object("Policy", "prod", Some("acme"), json!({"guardRail": true, "text": text}));
    let revision = cloud.world.store_global("policies", &policy).await;
    assert!(cloud.world.directory.seen(revision, std::time::Duration::from_secs(60)).await);
    let base = "/v1/regions/local/projects/shop/apps";
    let mut app = object("App", "web", None, json!({"image": "x"}));
    app["metadata"]["project"] = "shop".into();
    app["metadata"]["labels"] = json!({"env": "prod"});
    cloud.world.store_object("apps", &app).await;
    let verdict_of = async |method: &str, path: String, body: Option<Value>| {
        verdict(&cloud.call("editor", method, &path, body).await)
    };
    let to = |env: &str| json!({"metadata": {"labels": {"env": env}}});
    assert_eq!(verdict_of("PATCH", format!("{base}/web"), Some(to("test"))).await, "no", "away from it");
    assert_eq!(verdict_of("DELETE", format!("{base}/web"), None).await, "no");
    assert_eq!(verdict_of("PATCH", format!("{base}/example?dryRun=true"), Some(to("prod"))).await, "no", "into it");
    assert_eq!(verdict_of("PATCH", format!("{base}/example?dryRun=true"), Some(to("test"))).await, "yes");
    let mut body = json!({"metadata": {"name": "new", "labels": {"env": "prod"}}, "spec": {"image": "x"}});
    assert_eq!(verdict_of("POST", format!("{base}?dryRun=true"), Some(body.clone())).await, "no");
    body["metadata"]["labels"] = json!({});
    assert_eq!(verdict_of("POST", format!("{base}?dryRun=true"), Some(body)).await, "yes");
    // The refusal names the policy that decided.
    let answer = cloud.call("editor", "DELETE", &format!("{base}/web"), None).await;
    assert!(answer.json()["detail"].as_str().unwrap().contains("prod"), "{:?}", answer.body);
}

async fn sign_in(cloud: &Cloud, form: &[(&str, &str)]) -> Answer {
    let encoded = |text: &str| text.bytes().map(|b| format!("%{b:02X}")).collect::<String>();
    let form: Vec<String> = form.iter().map(|(k, v)| format!("{k}={}", encoded(v))).collect();
    let request = http::Request::post("/oauth2/token").header("content-type", "application/x-www-form-urlencoded");
    cloud.world.send(request.body(form.join("&").into()).unwrap()).await
}

const PASSWORD: &str = "seven green kettles sing";

/// Invites a user and takes the invitation; answers what the token endpoint gave.
async fn accept_invitation(cloud: &Cloud, user: &str) -> Value {
    let invited = cloud.call("owner", "POST", &format!("/v1/organizations/acme/users/{user}:invite"), None).await;
    assert_eq!(invited.status, StatusCode::OK, "{:?}", invited.body);
    let invitation = invited.json()["invitation"].as_str().unwrap().to_owned();
    let name = format!("acme/{user}");
    let form = [
        ("grant_type", "urn:cloudnexus:invitation"),
        ("username", name.as_str()),
        ("invitation", invitation.as_str()),
        ("password", PASSWORD),
    ];
    let weak = [form[0], form[1], form[2], ("password", "password123456")];
    assert_eq!(sign_in(cloud, &weak).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let granted = sign_in(cloud, &form).await;
    assert_eq!(granted.status, StatusCode::OK, "{:?}", granted.body);
    assert_eq!(granted.header("cache-control"), "no-store");
    assert_eq!(sign_in(cloud, &form).await.status, StatusCode::BAD_REQUEST, "an invitation is good once");
    granted.json()
}

async fn as_bearer(cloud: &Cloud, token: &str, path: &str) -> Answer {
    let request = http::Request::get(path).header("authorization", format!("Bearer {token}"));
    cloud.world.send(request.body(String::new().into()).unwrap()).await
}

#[tokio::test]
async fn a_user_signs_in_refreshes_and_is_signed_out_everywhere_by_a_stolen_refresh_token() {
    let cloud = Cloud::new().await;
    cloud.world.publish_key().await;
    accept_invitation(&cloud, "viewer").await;
    let wrong = [("grant_type", "password"), ("username", "acme/viewer"), ("password", "wrong words entirely")];
    let refused = sign_in(&cloud, &wrong).await;
    assert_eq!((refused.status, &refused.json()["error"]), (StatusCode::BAD_REQUEST, &json!("invalid_grant")));
    // An account that is not there is answered alike.
    let nobody = [wrong[0], ("username", "acme/nobody"), wrong[2]];
    let unknown = sign_in(&cloud, &nobody).await;
    assert_eq!((unknown.status, unknown.json()), (refused.status, refused.json()));

    let granted = sign_in(&cloud, &[wrong[0], wrong[1], ("password", PASSWORD)]).await.json();
    let (access, refresh) = (granted["access_token"].as_str().unwrap(), granted["refresh_token"].as_str().unwrap());
    let me = as_bearer(&cloud, access, "/v1/whoami").await;
    assert_eq!((me.status, &me.json()["name"]), (StatusCode::OK, &json!("acme/viewer")));
    assert_eq!(me.json()["roles"], json!([{"role": "viewer", "over": "organization acme"}]));

    let again = sign_in(&cloud, &[("grant_type", "refresh_token"), ("refresh_token", refresh)]).await;
    assert_eq!(again.status, StatusCode::OK, "{:?}", again.body);
    let second = again.json();
    assert_eq!(second["session"], granted["session"]);
    // Whoever brings the old one has copied it, or was robbed: nobody goes on with this session.
    let stolen = sign_in(&cloud, &[("grant_type", "refresh_token"), ("refresh_token", refresh)]).await;
    assert_eq!(stolen.status, StatusCode::BAD_REQUEST);
    let next = second["refresh_token"].as_str().unwrap();
    let ended = sign_in(&cloud, &[("grant_type", "refresh_token"), ("refresh_token", next)]).await;
    assert_eq!(ended.status, StatusCode::BAD_REQUEST);
    for token in [access, second["access_token"].as_str().unwrap()] {
        support::eventually(async || as_bearer(&cloud, token, "/v1/whoami").await.status == StatusCode::UNAUTHORIZED)
            .await;
    }
}

#[tokio::test]
async fn whoever_is_disabled_is_out_and_so_is_their_watch() {
    use http_body_util::BodyExt as _;
    let cloud = Cloud::new().await;
    cloud.world.publish_key().await;
    let granted = accept_invitation(&cloud, "viewer").await;
    let access = granted["access_token"].as_str().unwrap();
    let request = http::Request::get("/v1/regions/local/projects/shop/apps?watch=0")
        .header("authorization", format!("Bearer {access}"));
    let watch = cloud.world.raw(request.body(String::new().into()).unwrap()).await;
    assert_eq!(watch.status(), StatusCode::OK);
    let disabled = object("User", "viewer", Some("acme"), json!({"disabled": true}));
    cloud.world.store_global("users", &disabled).await;
    let all = tokio::time::timeout(std::time::Duration::from_secs(60), watch.into_body().collect());
    let text = String::from_utf8(all.await.expect("the watch ends").unwrap().to_bytes().to_vec()).unwrap();
    assert!(text.contains("event: error") && text.contains("unauthenticated"), "{text}");
    assert_eq!(as_bearer(&cloud, access, "/v1/whoami").await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_watch_ends_with_the_role_that_allowed_it() {
    use http_body_util::BodyExt as _;
    let cloud = Cloud::new().await;
    let secret = cloud.secrets.iter().find(|(p, _)| *p == "editor").unwrap().1.reveal();
    let request = http::Request::get("/v1/regions/local/projects/shop/apps?watch=0")
        .header("authorization", format!("Bearer {secret}"));
    let watch = cloud.world.raw(request.body(String::new().into()).unwrap()).await;
    let spec = json!({"role": "billing", "subjects": [{"kind": "User", "name": "editor", "organization": "acme"}]});
    cloud.world.store_global("role-bindings", &object("RoleBinding", "editor", Some("acme"), spec)).await;
    let all = tokio::time::timeout(std::time::Duration::from_secs(60), watch.into_body().collect());
    let text = String::from_utf8(all.await.expect("the watch ends").unwrap().to_bytes().to_vec()).unwrap();
    assert!(text.contains("event: error") && text.contains("forbidden"), "{text}");
}

#[tokio::test]
async fn forged_tokens_are_refused() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
    use nexus_iam::jwt::{Claims, SigningKey};
    let cloud = Cloud::new().await;
    cloud.world.publish_key().await;
    let granted = accept_invitation(&cloud, "owner").await;
    let good = granted["access_token"].as_str().unwrap().to_owned();
    let parts: Vec<&str> = good.split('.').collect();
    let claims: Claims = serde_json::from_slice(&B64.decode(parts[1]).unwrap()).unwrap();
    let ours = &cloud.world.signer;
    let signed = |change: &dyn Fn(&mut Claims)| {
        let mut claims = claims.clone();
        change(&mut claims);
        ours.sign(&claims).unwrap()
    };
    assert_eq!(as_bearer(&cloud, &signed(&|_| {}), "/v1/whoami").await.status, StatusCode::OK);
    let header = |text: &str| format!("{}.{}.{}", B64.encode(text), parts[1], parts[2]);
    let hmac = format!(r#"{{"alg":"HS256","typ":"at+jwt","kid":"{}"}}"#, ours.kid());
    let forged = [
        ("another key", SigningKey::generate().unwrap().sign(&claims).unwrap()),
        ("no algorithm", format!("{}.{}.", B64.encode(r#"{"alg":"none","typ":"at+jwt"}"#), parts[1])),
        ("key confusion", header(&hmac)),
        ("another issuer", signed(&|c| c.iss = "https://other.test".into())),
        ("another audience", signed(&|c| c.aud = "others".into())),
        ("expired", signed(&|c| (c.iat, c.nbf, c.exp) = (c.iat - 3600, c.iat - 3600, c.iat - 60))),
        ("not yet", signed(&|c| (c.iat, c.nbf, c.exp) = (c.iat + 3600, c.iat + 3600, c.iat + 7200))),
        ("another organization", signed(&|c| c.org = "globex".into())),
        ("nobody", signed(&|c| c.sub = "user:acme/nobody".into())),
        ("an operator", signed(&|c| c.sub = "operator:admin".into())),
        ("an ended session", signed(&|c| (c.sid, c.iat) = ("s-none".into(), c.iat - 60))),
        ("a changed payload", {
            let text = String::from_utf8(B64.decode(parts[1]).unwrap()).unwrap().replace("owner", "admin");
            format!("{}.{}.{}", parts[0], B64.encode(text), parts[2])
        }),
        ("half a token", good[..good.len() / 2].to_owned()),
        ("a bomb", "a".repeat(9000)),
    ];
    for (what, token) in forged {
        let answer = as_bearer(&cloud, &token, "/v1/whoami").await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{what}: {:?}", answer.body);
        assert!(answer.header("www-authenticate").contains("invalid_token"), "{what}");
    }
}

#[tokio::test]
async fn guessing_a_password_soon_has_to_wait() {
    let cloud = Cloud::new().await;
    accept_invitation(&cloud, "viewer").await;
    let wrong = [("grant_type", "password"), ("username", "acme/viewer"), ("password", "not the right words")];
    let mut waited = None;
    for _ in 0..10 {
        let answer = sign_in(&cloud, &wrong).await;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            waited = Some(answer.header("retry-after").parse::<u64>().unwrap());
            break;
        }
    }
    assert!(waited.is_some_and(|s| s >= 1), "ten wrong tries in a row");
    // Also the right one waits now, or guessing would be told by it.
    let right = [wrong[0], wrong[1], ("password", PASSWORD)];
    assert_eq!(sign_in(&cloud, &right).await.status, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn one_caller_can_ask_only_so_much_and_an_operator_everything() {
    let limits = nexus_api::Limits {
        caller_rate: nexus_api::Rate::new(1, 5),
        project_rate: nexus_api::Rate::new(1, 8),
        ..nexus_api::Limits::default()
    };
    let cloud = Cloud::with(limits).await;
    let ask = async |who: &str, path: &str| cloud.call(who, "GET", path, None).await;
    let first = ask("viewer", "/v1/whoami").await;
    assert_eq!((first.header("x-ratelimit-limit"), first.header("x-ratelimit-remaining")), ("5", "4"));
    assert!(first.header("x-ratelimit-reset").parse::<u64>().unwrap() >= 1);
    // Generous: on a slow machine some tokens come back meanwhile.
    let mut refused = None;
    for _ in 0..200 {
        let answer = ask("viewer", "/v1/whoami").await;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("the bucket is empty at some time");
    assert!(refused.header("retry-after").parse::<u64>().unwrap() >= 1);
    assert!(refused.problem("overloaded")["detail"].as_str().unwrap().contains("acme/viewer"));
    // Others have their own; what is asked of one project is shared.
    let other = ask("editor", "/v1/regions/local/projects/shop/apps").await;
    assert_eq!(other.status, StatusCode::OK);
    let mut shared = None;
    for who in
        ["editor", "admin", "owner", "auditor", "editor", "admin", "owner", "auditor"].into_iter().cycle().take(200)
    {
        let answer = ask(who, "/v1/regions/local/projects/shop/apps").await;
        let about_it = answer.status == StatusCode::TOO_MANY_REQUESTS
            && answer.json()["detail"].as_str().unwrap().contains("project shop");
        if about_it {
            shared = Some(answer);
            break;
        }
    }
    assert!(shared.is_some(), "the project's bucket is empty at some time");
    // The fleet's own key is not bounded, and names that nobody has make no buckets.
    for _ in 0..50 {
        let answer = cloud.world.get("/v1/regions/local/projects/ghost/apps").await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header("x-ratelimit-limit"), "");
    }
}

#[tokio::test]
async fn a_quota_is_set_only_from_above() {
    let cloud = Cloud::new().await;
    let organization = |n: u32| json!({"spec": {"quota": {"instances": n}}});
    let change = async |who: &str, path: &str, body: Value| {
        verdict(&cloud.call(who, "PATCH", &format!("{path}?dryRun=true"), Some(body)).await)
    };
    assert_eq!(change("owner", "/v1/organizations/acme", organization(7)).await, "no");
    assert_eq!(change("owner", "/v1/organizations/acme", json!({"spec": {"displayName": "A"}})).await, "yes");
    assert_eq!(change("operator", "/v1/organizations/acme", organization(7)).await, "yes");
    // An organization's administrators ration its projects; a project's own don't.
    assert_eq!(change("admin", "/v1/projects/shop", organization(7)).await, "yes");
    let spec = json!({"role": "owner", "project": "shop", "subjects": [{"kind": "User", "name": "viewer"}]});
    let revision = cloud.world.store_global("role-bindings", &object("RoleBinding", "own", Some("acme"), spec)).await;
    assert!(cloud.world.directory.seen(revision, std::time::Duration::from_secs(60)).await);
    assert_eq!(change("viewer", "/v1/projects/shop", organization(7)).await, "no");
    let app = "/v1/regions/local/projects/shop/apps/example";
    assert_eq!(change("viewer", app, json!({"spec": {"replicas": 2}})).await, "yes");
}

#[tokio::test]
async fn an_image_is_made_only_of_what_its_project_brought() {
    let cloud = Cloud::new().await;
    let image = |content: &[u8]| {
        let digest = nexus_model::Digest::of(content);
        let spec = json!({"format": "wasm", "digest": digest, "blobs": [{"digest": digest, "size": content.len()}]});
        json!({"metadata": {"name": "stolen"}, "spec": spec})
    };
    let images = "/v1/regions/local/projects/shop/images";
    let stolen = cloud.call("editor", "POST", images, Some(image(b"never brought"))).await;
    assert_eq!(stolen.problem("invalid")["errors"][0]["field"], "spec.blobs[0]");
    let own = cloud.call("editor", "POST", images, Some(image(b""))).await;
    assert_eq!(own.status, StatusCode::CREATED, "{:?}", own.body);
}

#[tokio::test]
async fn a_projects_own_administrators_grant_over_it_and_no_further() {
    let cloud = Cloud::new().await;
    let spec = json!({"role": "admin", "project": "shop", "subjects": [{"kind": "User", "name": "billing"}]});
    let revision = cloud.world.store_global("role-bindings", &object("RoleBinding", "own", Some("acme"), spec)).await;
    assert!(cloud.world.directory.seen(revision, std::time::Duration::from_secs(60)).await);
    let bind = async |role: &str, project: Option<&str>| {
        let mut spec = json!({"role": role, "subjects": [{"kind": "User", "name": "viewer"}]});
        if let Some(project) = project {
            spec["project"] = project.into();
        }
        let body = json!({"metadata": {"name": "new"}, "spec": spec});
        verdict(&cloud.call("billing", "POST", "/v1/organizations/acme/role-bindings?dryRun=true", Some(body)).await)
    };
    assert_eq!(bind("editor", Some("shop")).await, "yes");
    assert_eq!(bind("owner", Some("shop")).await, "no", "only owners make owners");
    assert_eq!(bind("editor", None).await, "no", "over the whole organization");
    assert_eq!(bind("editor", Some("lab")).await, "no", "over another's project");
}

/// What an authenticator shows, `steps` of half a minute from now.
fn code(secret: &str, steps: i64) -> String {
    let bytes = data_encoding::BASE32_NOPAD.decode(secret.as_bytes()).unwrap();
    let now = std::time::SystemTime::now();
    let then = if steps < 0 { now - 30 * std::time::Duration::from_secs(steps.unsigned_abs()) } else { now };
    nexus_iam::totp::TotpSecret::from_bytes(&bytes).unwrap().code_at(then).to_string()
}

#[tokio::test]
async fn a_second_factor_is_asked_for_and_a_code_is_good_once() {
    let cloud = Cloud::new().await;
    cloud.world.publish_key().await;
    let granted = accept_invitation(&cloud, "viewer").await;
    let access = granted["access_token"].as_str().unwrap().to_owned();
    let post = async |verb: &str, body: Value| {
        let request = http::Request::post(format!("/v1/organizations/acme/users/viewer:{verb}"))
            .header("authorization", format!("Bearer {access}"))
            .header("content-type", "application/json");
        cloud.world.send(request.body(body.to_string().into()).unwrap()).await
    };
    let enrolled = post("enroll-totp", json!({})).await;
    assert_eq!(enrolled.status, StatusCode::OK, "{:?}", enrolled.body);
    let enrolled = enrolled.json();
    let secret = enrolled["secret"].as_str().unwrap();
    let recovery = enrolled["recoveryCodes"][0].as_str().unwrap();
    // Until it is confirmed nothing is asked for.
    let by = async |otp: Option<&str>| {
        let mut form = vec![("grant_type", "password"), ("username", "acme/viewer"), ("password", PASSWORD)];
        form.extend(otp.map(|otp| ("otp", otp)));
        sign_in(&cloud, &form).await
    };
    assert_eq!(by(None).await.status, StatusCode::OK);
    assert_eq!(post("confirm-totp", json!({"code": "000000"})).await.status, StatusCode::FORBIDDEN);
    assert_eq!(post("confirm-totp", json!({"code": code(secret, -1)})).await.status, StatusCode::OK);
    support::eventually(async || by(None).await.json()["error"] == "mfa_required").await;
    assert_eq!(by(Some(&code(secret, -1))).await.json()["error"], "invalid_grant", "it was used");
    let signed_in = by(Some(&code(secret, 0))).await;
    assert_eq!(signed_in.status, StatusCode::OK, "{:?}", signed_in.body);
    let token = signed_in.json()["access_token"].as_str().unwrap().to_owned();
    assert_eq!(as_bearer(&cloud, &token, "/v1/whoami").await.json()["mfa"], true);
    let again = by(Some(recovery)).await;
    assert_eq!(again.status, StatusCode::OK, "{:?}", again.body);
    support::eventually(async || by(Some(recovery)).await.json()["error"] == "invalid_grant").await;
    // Only an administrator's invitation takes it away.
    assert_eq!(post("enroll-totp", json!({})).await.status, StatusCode::CONFLICT);
    accept_invitation(&cloud, "viewer").await;
    support::eventually(async || by(None).await.status == StatusCode::OK).await;
}

/// An access key of a user, as (id, secret).
async fn access_key(cloud: &Cloud, who: &str) -> nexus_iam::access_key::AccessKey {
    let body = json!({"metadata": {"name": format!("k-{who}")}, "spec": {}});
    let made = cloud.call(who, "POST", "/v1/organizations/acme/access-keys", Some(body)).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    let made = made.json();
    nexus_iam::access_key::AccessKey {
        id: made["spec"]["id"].as_str().unwrap().parse().unwrap(),
        secret: made["status"]["secret"].as_str().unwrap().parse().unwrap(),
    }
}

/// A request signed by a key.
fn signed(
    key: &nexus_iam::access_key::AccessKey,
    method: &str,
    path: &str,
    body: &str,
    at: std::time::SystemTime,
) -> http::Request<axum::body::Body> {
    use nexus_iam::sigv4::{Body, Request, sign};
    use sha2::Digest as _;
    let (path_only, query) = path.split_once('?').unwrap_or((path, ""));
    let fixed: [(&str, &[u8]); 2] = [("host", b"cloud.test"), ("content-type", b"application/json")];
    let request = Request { method, path: path_only, query, headers: &fixed };
    let hash: [u8; 32] = sha2::Sha256::digest(body.as_bytes()).into();
    let signed = sign(&request, Body::Sha256(hash), key, "local", "nexus", at).unwrap();
    let mut request = http::Request::builder().method(method).uri(path);
    for (name, value) in fixed {
        request = request.header(name, value);
    }
    for (name, value) in signed.0 {
        request = request.header(name, value);
    }
    request.body(body.to_owned().into()).unwrap()
}

#[tokio::test]
async fn signed_requests_are_their_signers_and_nothing_of_them_may_change() {
    use std::time::{Duration, SystemTime};
    let cloud = Cloud::new().await;
    cloud.world.publish_key().await;
    let key = access_key(&cloud, "editor").await;
    let apps = "/v1/regions/local/projects/shop/apps";
    let send = async |request: http::Request<axum::body::Body>| cloud.world.send(request).await;
    let now = SystemTime::now();
    let list = send(signed(&key, "GET", apps, "", now)).await;
    assert_eq!(list.status, StatusCode::OK, "{:?}", list.body);
    let app = json!({"metadata": {"name": "signed"}, "spec": {"image": "x"}}).to_string();
    let made = send(signed(&key, "POST", apps, &app, now)).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.body);
    let refused = async |what: &str, request: http::Request<axum::body::Body>| {
        let answer = send(request).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{what}: {:?}", answer.body);
    };
    let (parts, _) = signed(&key, "GET", apps, "", now).into_parts();
    let twice = || http::Request::from_parts(parts.clone(), String::new().into());
    assert_eq!(send(twice()).await.status, StatusCode::OK);
    refused("replayed", twice()).await;
    refused("long ago", signed(&key, "GET", apps, "", now - Duration::from_secs(3600))).await;
    refused("to come", signed(&key, "GET", apps, "", now + Duration::from_secs(3600))).await;
    let later = now + Duration::from_secs(1);
    let mut changed = signed(&key, "GET", apps, "", later);
    *changed.uri_mut() = "/v1/regions/local/projects/shop/routes".parse().unwrap();
    refused("another path", changed).await;
    let mut changed = signed(&key, "GET", apps, "", later);
    changed.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    refused("a changed header", changed).await;
    let mut added = signed(&key, "DELETE", &format!("{apps}/signed"), "", later);
    added.headers_mut().insert("if-match", "\"1\"".parse().unwrap());
    refused("an added header", added).await;
    let other =
        nexus_iam::access_key::AccessKey { secret: nexus_iam::access_key::SecretKey::generate(), ..key.clone() };
    refused("another secret", signed(&other, "GET", apps, "", later)).await;
    let unknown = nexus_iam::access_key::AccessKey::generate();
    refused("an unknown key", signed(&unknown, "GET", apps, "", later)).await;
    // A body that was put in place of the signed one does nothing.
    let evil = json!({"metadata": {"name": "evil"}, "spec": {"image": "x"}}).to_string();
    let good = json!({"metadata": {"name": "good"}, "spec": {"image": "x"}}).to_string();
    let (parts, _) = signed(&key, "POST", apps, &good, later).into_parts();
    let answer = send(http::Request::from_parts(parts, evil.into())).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{:?}", answer.body);
    assert_eq!(cloud.call("viewer", "GET", &format!("{apps}/evil"), None).await.status, StatusCode::NOT_FOUND);
    // What the key may do is what its holder may.
    let denied = send(signed(&key, "GET", "/v1/organizations/globex/users", "", later)).await;
    assert_eq!(denied.status, StatusCode::NOT_FOUND);

    // The same key gets an access token.
    let form =
        [("grant_type", "client_credentials"), ("client_id", key.id.as_str()), ("client_secret", key.secret.expose())];
    let granted = sign_in(&cloud, &form).await;
    assert_eq!(granted.status, StatusCode::OK, "{:?}", granted.body);
    let [access, refresh] = ["access_token", "refresh_token"].map(|f| granted.json()[f].as_str().unwrap().to_owned());
    assert_eq!(as_bearer(&cloud, &access, "/v1/whoami").await.json()["name"], "acme/editor");
    let wrong = [form[0], form[1], ("client_secret", "not the secret of this key")];
    assert_eq!(sign_in(&cloud, &wrong).await.json()["error"], "invalid_client");

    // Deleted, it opens nothing.
    let gone = cloud.call("editor", "DELETE", "/v1/organizations/acme/access-keys/k-editor", None).await;
    assert_eq!(gone.status, StatusCode::OK, "{:?}", gone.body);
    let mut step = 2;
    support::eventually(async || {
        step += 1;
        let at = now + Duration::from_secs(step);
        send(signed(&key, "GET", apps, "", at)).await.status == StatusCode::UNAUTHORIZED
    })
    .await;
    // Nor do the tokens that it got.
    support::eventually(async || as_bearer(&cloud, &access, "/v1/whoami").await.status == StatusCode::UNAUTHORIZED)
        .await;
    let again = [("grant_type", "refresh_token"), ("refresh_token", refresh.as_str())];
    assert_eq!(sign_in(&cloud, &again).await.json()["error"], "invalid_grant");
}
