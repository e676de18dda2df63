//! Puts everything that is sealed under the current master key: secrets, access keys, second factors and identity providers'
//! client secrets, of this server's region and of what all regions share.
//!
//! Values stay as they are; only the keys that they are sealed by are sealed anew. Each row is written only if it is still what
//! was read, so it may run at any time, break off, and be run again. Secrets' rows belong to no table, so they are written
//! here; objects go through their writer, like any change of them.

use std::sync::Arc;

use nexus_api::operations::{MasterKeys, SealedCount};
use nexus_control::intent::{Change, Intent, Provenance, Target, Writer};
use nexus_control::secrets::VersionId;
use nexus_env::{Env, RngExt as _};
use nexus_iam::envelope::{self, Context, KeyProvider, Sealed};
use nexus_model::kind::{self, AccessKey, Credential, GLOBAL, IdentityProvider, Kind};
use nexus_model::{ApiError, Code, Name, Object, RequestId, key};
use nexus_store::{KeyValue, RangeRequest, Store};

use super::fleet;
use super::operations::from_store;

const PAGE: usize = 200;
/// So many failures are told of.
const TOLD: usize = 20;

pub struct Rewrap {
    pub region: Name,
    pub server: Name,
    pub stores: [(Name, Arc<dyn Store>); 2],
    pub global_writer: Arc<dyn Writer>,
    pub keys: Arc<dyn KeyProvider>,
    pub env: Env,
}

/// What became of one sealed value.
enum Done {
    Kept,
    Rewrapped,
    Failed(String),
}

/// What an object keeps sealed.
struct Kept<'a> {
    what: String,
    context: Context,
    sealed: &'a mut String,
}

fn of_access_key(object: &mut Object<AccessKey>) -> Option<Kept<'_>> {
    let id = object.spec.id.clone()?;
    let (what, context) = (format!("access key {id}"), Context::access_key(&id));
    Some(Kept { what, context, sealed: object.spec.sealed.as_mut()? })
}

fn of_second_factor(object: &mut Object<Credential>) -> Option<Kept<'_>> {
    let user = format!("{}/{}", object.metadata.organization.as_ref()?, object.metadata.name);
    let (what, context) = (format!("the second factor of {user}"), Context::totp(&user));
    Some(Kept { what, context, sealed: &mut object.spec.second_factor.as_mut()?.secret })
}

fn of_client(object: &mut Object<IdentityProvider>) -> Option<Kept<'_>> {
    let (organization, name) = (object.metadata.organization.clone()?, &object.metadata.name);
    let context = Context::client_secret(organization.as_str(), name.as_str(), &object.spec.issuer);
    let what = format!("the client secret of {organization}/{name}");
    Some(Kept { what, context, sealed: object.spec.sealed_secret.as_mut()? })
}

impl Rewrap {
    /// Looks at everything that is sealed, and changes it unless it is only to be counted.
    pub async fn run(&self, change: bool) -> Result<MasterKeys, ApiError> {
        let mut report = MasterKeys {
            region: self.region.to_string(),
            server: self.server.to_string(),
            current: self.keys.current().to_string(),
            ..MasterKeys::default()
        };
        for (region, store) in &self.stores {
            for kv in rows(&**store, key::SECRETS).await? {
                let done = self.secret(&**store, region, &kv, change, &mut report).await;
                count(&mut report, |r| &mut r.secrets, done);
            }
        }
        self.objects::<AccessKey>(change, &mut report, |r| &mut r.access_keys, of_access_key).await?;
        self.objects::<Credential>(change, &mut report, |r| &mut r.second_factors, of_second_factor).await?;
        self.objects::<IdentityProvider>(change, &mut report, |r| &mut r.client_secrets, of_client).await?;
        Ok(report)
    }

    /// What objects of a kind of the global group keep sealed.
    async fn objects<K: Kind>(
        &self,
        change: bool,
        report: &mut MasterKeys,
        of: fn(&mut MasterKeys) -> &mut SealedCount,
        kept: fn(&mut Object<K>) -> Option<Kept<'_>>,
    ) -> Result<(), ApiError> {
        let [_, (_, global)] = &self.stores;
        for kv in rows(&**global, &objects::<K>()).await? {
            let Ok(mut object) = Object::<K>::from_slice(&kv.value) else { continue };
            let Some(Kept { what, context, sealed }) = kept(&mut object) else { continue };
            let done = match self.sealed(sealed, &context, change, report) {
                Ok(None) => Done::Kept,
                Ok(Some(anew)) => {
                    *sealed = anew;
                    self.put(object, kv.mod_revision.0).await
                }
                Err(why) => Done::Failed(format!("{what}: {why}")),
            };
            count(report, of, done);
        }
        Ok(())
    }

    async fn secret(
        &self,
        store: &dyn Store,
        region: &Name,
        kv: &KeyValue,
        change: bool,
        report: &mut MasterKeys,
    ) -> Done {
        let shown = String::from_utf8_lossy(&kv.key).into_owned();
        let Some(id) = VersionId::of_key(region, &kv.key) else { return Done::Failed(format!("{shown}: no version")) };
        let text = String::from_utf8_lossy(&kv.value);
        match self.sealed(&text, &id.context(), change, report) {
            Ok(None) => Done::Kept,
            Ok(Some(anew)) => {
                let value: serde_json::Value = serde_json::from_str(&anew).expect("written just now");
                match fleet::put_if(store, &shown, Some(kv.mod_revision), &value).await {
                    Ok(true) => Done::Rewrapped,
                    // Its secret was deleted, or another server did the same.
                    Ok(false) => Done::Kept,
                    Err(error) => Done::Failed(format!("{shown}: {error}")),
                }
            }
            Err(why) => Done::Failed(format!("{shown}: {why}")),
        }
    }

    /// The same under the current key, if it is not yet and shall be. Counts the key that it needs in the end.
    fn sealed(
        &self,
        text: &str,
        context: &Context,
        change: bool,
        report: &mut MasterKeys,
    ) -> Result<Option<String>, String> {
        let sealed: Sealed = serde_json::from_str(text).map_err(|_| "it can't be read".to_owned())?;
        let anew = match change {
            true => envelope::rewrap(&*self.keys, context, &sealed),
            false => Ok(None),
        };
        let needed = anew.as_ref().ok().and_then(Option::as_ref).unwrap_or(&sealed).master_key().to_string();
        *report.used.entry(needed).or_default() += 1;
        let anew = anew.map_err(|e| e.to_string())?;
        Ok(anew.map(|anew| serde_json::to_string(&anew).expect("a sealed value is plain data")))
    }

    /// Writes an object of the global group, if it is what was read.
    async fn put<K: Kind>(&self, object: Object<K>, revision: u64) -> Done {
        let what = format!("{} {}", K::KIND, object.metadata.name);
        let intent = Intent {
            request_id: RequestId::from_random(self.env.rng.bytes()),
            actor: self.server.to_string(),
            by: Provenance { principal: format!("server:{}", self.server), ..Provenance::default() },
            target: Target {
                plural: K::PLURAL.to_owned(),
                project: None,
                organization: object.metadata.organization.clone(),
                name: object.metadata.name.clone(),
            },
            change: Change::Put { object: object.to_any() },
            if_match: Some(revision),
            idempotency_key: None,
            dry_run: false,
        };
        match self.global_writer.submit(intent).await {
            Ok(_) => Done::Rewrapped,
            Err(e) if e.code == Code::PreconditionFailed => Done::Failed(format!("{what}: it changed: run this again")),
            Err(e) => Done::Failed(format!("{what}: {}", e.detail)),
        }
    }
}

fn count(report: &mut MasterKeys, of: fn(&mut MasterKeys) -> &mut SealedCount, done: Done) {
    let counted = of(report);
    counted.seen += 1;
    match done {
        Done::Kept => {}
        Done::Rewrapped => counted.rewrapped += 1,
        Done::Failed(why) => {
            counted.failed += 1;
            if report.failures.len() < TOLD {
                report.failures.push(why);
            }
        }
    }
}

fn objects<K: Kind>() -> String {
    key::objects(kind::stored(K::PLURAL).expect("every kind is listed"), None)
}

/// Every row under a prefix, as the group has it now.
async fn rows(store: &dyn Store, prefix: &str) -> Result<Vec<KeyValue>, ApiError> {
    let mut found: Vec<KeyValue> = Vec::new();
    let mut start = bytes::Bytes::copy_from_slice(prefix.as_bytes());
    loop {
        let page = store.range(RangeRequest::new(start, key::prefix_end(prefix)).limit(PAGE)).await;
        let page = page.map_err(from_store)?;
        found.extend(page.kvs);
        match found.last() {
            Some(last) if page.more => start = [&last.key[..], &[0]].concat().into(),
            _ => return Ok(found),
        }
    }
}

/// The stores of a server: its region's, and the one that all regions share.
pub fn stores(region: &Name, own: Arc<dyn Store>, global: Arc<dyn Store>) -> [(Name, Arc<dyn Store>); 2] {
    [(region.clone(), own), (GLOBAL.parse().expect("a well-formed name"), global)]
}
