//! `/healthz`, `/readyz` and `/metrics` of roles that have no API, in plain HTTP.

use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use nexus_env::{Endpoint, Env};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::server::northbound;

/// What a role says of itself.
#[derive(Clone)]
pub struct Facts {
    /// Whether it can serve; if not, why.
    pub ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// In Prometheus' text format.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
}

/// Takes the endpoint and serves until `stop`.
pub async fn listen(
    tasks: &mut JoinSet<()>,
    env: &Env,
    endpoint: Endpoint,
    facts: Facts,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || async move {
                match (facts.ready)() {
                    Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                    Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
                }
            }),
        )
        .route(
            "/metrics",
            get(move || async move {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], (facts.metrics)())
            }),
        );
    northbound::listen(tasks, env, endpoint, None, router, stop).await
}
