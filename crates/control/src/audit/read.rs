//! Reading a group's audit log from any server's store: its state, and the tiles that proofs are made of. Records and full
//! tiles never change, so nothing here needs a snapshot.

use std::collections::BTreeMap;

use nexus_audit::tiles::{TILE, TileId, decode_tile};
use nexus_audit::{Entry, Hash, LogState};
use nexus_model::key;
use nexus_store::{RangeRequest, Revision, Store, StoreError};

/// Why the log can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{key} of the audit log can't be read: {why}")]
    Damaged { key: String, why: String },
}

fn damaged(key: impl Into<String>, why: impl ToString) -> ReadError {
    ReadError::Damaged { key: key.into(), why: why.to_string() }
}

/// How far the log has come, with the right edge of its tree.
pub async fn state(store: &dyn Store) -> Result<LogState, ReadError> {
    match store.range(RangeRequest::get(key::AUDIT_STATE)).await?.kvs.pop() {
        Some(kv) => LogState::from_bytes(&kv.value).map_err(|e| damaged(key::AUDIT_STATE, e)),
        None => Ok(LogState { frontier: nexus_audit::Frontier::default(), head: Hash::ZERO }),
    }
}

/// Some tiles of the tree, with the hashes that they have at `size` records at least; `at` is `None` for now.
pub async fn tiles(
    store: &dyn Store,
    at: Option<Revision>,
    ids: impl IntoIterator<Item = TileId>,
    size: u64,
) -> Result<BTreeMap<TileId, Vec<Hash>>, ReadError> {
    let mut tiles = BTreeMap::new();
    for id in ids {
        let row = format!("{}{id}", key::AUDIT_TILES);
        let request = RangeRequest { at, ..RangeRequest::get(row.clone()) };
        if let Some(kv) = store.range(request).await?.kvs.pop() {
            let tile = decode_tile(&kv.value).ok_or_else(|| damaged(row, "it is no tile"))?;
            tiles.insert(id, tile);
            continue;
        }
        if id.level > 0 {
            continue;
        }
        // The unfinished tile of level 0 is not stored: its hashes are those of the last records.
        let first = id.first_record();
        let end = size.min(first + TILE as u64);
        let mut request = RangeRequest::new(key::audit_record(first), key::audit_record(end)).limit(TILE);
        request.at = at;
        let mut hashes = Vec::new();
        for kv in store.range(request).await?.kvs {
            let hash = Entry::from_row(&kv.value).and_then(|entry| entry.record.hash());
            hashes.push(hash.map_err(|e| damaged(String::from_utf8_lossy(&kv.key), e))?);
        }
        tiles.insert(id, hashes);
    }
    Ok(tiles)
}

/// The row of a server's last anchor.
pub fn anchor_row(server: &str) -> String {
    format!("{}{server}", key::AUDIT_ANCHORS)
}

/// The row of a public key.
pub fn key_row(server: &str, id: &str) -> String {
    format!("{}{server}/{id}", key::AUDIT_KEYS)
}
