//! Scaling at the edge: `POST /v1/architecture/scale`, which is a change of an app in few words, and what an app's load was.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderValue, Method, Uri};
use nexus_control::autoscale::history::{History, Measure, SLOT_SECONDS};
use nexus_model::kind::{App, Kind};
use nexus_model::{ApiError, Code, FieldError, Name, Object, key};
use nexus_store::{Consistency, RangeRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::input::read_json;
use crate::list::{find, unreadable};
use crate::problem::{Refusal, from_store};
use crate::query::Query;
use crate::route::{self, Place, Target};
use crate::serve::{self, Server};
use crate::write::JSON;

/// Asks that an app be scaled by the cloud.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScaleRequest {
    /// The app.
    service: Name,
    /// Windows of a schedule are part of the app's own spec.
    #[serde(default)]
    strategy: ByLoad,
    /// Per cent of its processor that an instance is to use.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100))]
    threshold_cpu: Option<u32>,
    #[serde(default)]
    #[schemars(range(min = 1, max = 10_000))]
    max_replicas: Option<u32>,
    #[serde(default = "default_project")]
    project: Name,
    /// Without it, the region of the server that is asked.
    #[serde(default)]
    region: Option<Name>,
}

/// The strategies that go by load.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ByLoad {
    Target,
    #[default]
    Predictive,
}

fn default_project() -> Name {
    "default".parse().expect("a well-formed name")
}

/// Turns a request to scale into the patch of the app that it means: whoever may change the app may do it.
pub(crate) async fn as_patch(server: &Server, parts: &mut Parts, body: Body) -> Result<(Target, Body), ApiError> {
    let value = read_json(&parts.headers, body, JSON).await?;
    let asked: ScaleRequest =
        serde_json::from_value(value).map_err(|e| ApiError::invalid(vec![FieldError::new("", e.to_string())]))?;
    let mut autoscale = json!({"strategy": asked.strategy});
    if let Some(cpu) = asked.threshold_cpu {
        // What was asked for before by another measure is not asked for any more.
        autoscale["target"] = json!({"cpuPercent": cpu, "requestsPerSecond": null, "concurrency": null});
    }
    if let Some(max) = asked.max_replicas {
        autoscale["maxReplicas"] = max.into();
    }
    let region = asked.region.as_ref().unwrap_or(&server.api.region);
    let path = format!("/v1/regions/{region}/projects/{}/{}/{}", asked.project, App::PLURAL, asked.service);
    let target = route::resolve(&path, &server.api.region)?;
    let with_query = match parts.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    parts.uri = with_query.parse::<Uri>().map_err(|e| ApiError::new(Code::BadRequest, format!("the query: {e}")))?;
    parts.method = Method::PATCH;
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/merge-patch+json"));
    let patch = serde_json::to_vec(&json!({"spec": {"autoscale": autoscale}})).expect("a patch is plain data");
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(patch.len()));
    Ok((target, Body::from(patch)))
}

/// What an app's load was: means of slots, oldest first, `null` where nothing is known.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Load {
    /// When the first slot begins, in seconds since 1970.
    begins: u64,
    slot_seconds: u64,
    measures: BTreeMap<&'static str, Vec<Option<f64>>>,
}

const MEASURES: [(&str, Measure); 3] =
    [("cpu", Measure::Cpu), ("requests", Measure::Requests), ("concurrency", Measure::Concurrency)];

/// Answers `GET …/apps/NAME:load`.
pub(crate) async fn load(server: &Server, place: &Place, name: &Name, parts: &Parts) -> Result<Response, Refusal> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let Some(kv) = find(server, place, name, Consistency::Linearizable).await? else {
        return Err(ApiError::not_found(App::KIND, name.as_str()).into());
    };
    if place.is_global() {
        let detail = "a global app's load is kept by each of its regions: ask in one of them";
        return Err(Refusal::new(Code::NotFound, detail));
    }
    let app = Object::<App>::from_slice(&kv.value).map_err(|e| unreadable(&kv, &e))?;
    let prefix = key::load_histories(app.metadata.uid);
    // One row a day, for two weeks.
    let request = RangeRequest::new(prefix.clone(), key::prefix_end(&prefix)).limit(64);
    let rows = server.store(place).range(request).await.map_err(from_store)?.kvs;
    let history = History::from_rows(rows.iter().filter_map(|kv| Some((key::load_of(&kv.key)?.1, kv.value.to_vec()))));
    let measures = MEASURES.map(|(word, measure)| (word, history.values(measure))).into();
    Ok(serve::json(&Load { begins: history.begins(), slot_seconds: SLOT_SECONDS, measures }))
}
