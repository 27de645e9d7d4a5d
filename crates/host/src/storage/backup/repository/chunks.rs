//! Chunks: a byte that says how, then the content plain (0) or compressed with zstd (1), whichever is shorter.

use super::{CHUNK, ChunkId, Index, Repository, apart, hex, says, store::Object};
use crate::agent::storage::StorageFailure;
use bytes::Bytes;
use sha2::{Digest, Sha256};

/// Of zstd.
pub(super) const LEVEL: i32 = 3;

const PLAIN: u8 = 0;
const COMPRESSED: u8 = 1;

/// Where a chunk stands.
pub(super) fn key(id: &ChunkId) -> String {
    let name = hex(id);
    format!("chunks/{}/{name}", &name[..2])
}

/// The chunk of that file name.
pub(super) fn parse(name: &str) -> Option<ChunkId> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = name.as_bytes().as_chunks::<2>();
    let bytes: Option<Vec<u8>> =
        pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    rest.is_empty().then_some(bytes?)?.try_into().ok()
}

/// Nothing when it is all zeros.
fn id_of(content: &[u8]) -> Option<ChunkId> {
    let zeros = |part: &[u8]| part.iter().fold(0, |any, byte| any | byte) == 0;
    let all_zeros = content.chunks(4096).all(zeros);
    (!all_zeros).then(|| Sha256::digest(content).into())
}

fn pack(content: &[u8]) -> Vec<u8> {
    let packed = zstd::bulk::compress(content, LEVEL).ok();
    let (kind, body) = match &packed {
        Some(packed) if packed.len() < content.len() => (COMPRESSED, packed.as_slice()),
        _ => (PLAIN, content),
    };
    [&[kind], body].concat()
}

/// The content, if it is that of this chunk.
fn unpack(id: &ChunkId, stored: &Bytes) -> Result<Bytes, String> {
    let content = match stored.first() {
        None => return Err("it is empty".to_owned()),
        Some(&PLAIN) => stored.slice(1..),
        Some(&COMPRESSED) => zstd::bulk::decompress(&stored[1..], CHUNK as usize)
            .map_err(|error| format!("it cannot be decompressed: {error}"))?
            .into(),
        Some(kind) => return Err(format!("its kind is {kind}, which is none")),
    };
    if ChunkId::from(Sha256::digest(&content)) == *id {
        Ok(content)
    } else {
        Err("its content does not have its checksum".to_owned())
    }
}

impl Repository {
    /// Stores a chunk that is not there yet. Gives its id, nothing for one of zeros, and how many bytes this added.
    ///
    /// # Errors
    /// A sentence, when it cannot be written.
    pub async fn put(&self, content: Bytes) -> Result<(Option<ChunkId>, u64), StorageFailure> {
        if content.is_empty() || content.len() as u64 > CHUNK {
            return Err(says(format!(
                "a chunk has 1 to {CHUNK} bytes, not {}: this is a fault of Haven",
                content.len()
            )));
        }
        self.here().await?;
        let of = content.clone();
        let Some(id) = apart(move || id_of(&of)).await else { return Ok((None, 0)) };
        let key = key(&id);
        // One without a body is no chunk.
        if self.store.head(&key).await?.is_some_and(|object| object.size > 1) {
            return Ok((Some(id), 0));
        }
        let packed = apart(move || pack(&content)).await;
        let stored = packed.len() as u64;
        self.store.put(&key, Bytes::from(packed)).await?;
        Ok((Some(id), stored))
    }

    /// The content of a chunk, of which the checksum was compared.
    ///
    /// # Errors
    /// A sentence that names the object, when it is missing or damaged, or cannot be read.
    pub async fn get(&self, id: &ChunkId) -> Result<Bytes, StorageFailure> {
        let (at, stored) = self.find(id).await?;
        self.check(id, &at, stored).await
    }

    async fn check(&self, id: &ChunkId, at: &str, stored: Bytes) -> Result<Bytes, StorageFailure> {
        let id = *id;
        apart(move || unpack(&id, &stored)).await.map_err(|why| {
            says(format!(
                "{} is damaged ({why}): the backups that need it cannot be restored whole, and its disk may be failing; verify the others",
                self.store.shown(at)
            ))
        })
    }

    /// A chunk as it stands, and where. One that a backup names may stand aside until the next sweep.
    async fn find(&self, id: &ChunkId) -> Result<(String, Bytes), StorageFailure> {
        self.here().await?;
        let at = key(id);
        if let Some(stored) = self.store.get(&at, CHUNK + 1).await? {
            return Ok((at, stored));
        }
        for folder in self.store.folders("aside").await? {
            let aside = format!("{folder}/{}", hex(id));
            if let Some(stored) = self.store.get(&aside, CHUNK + 1).await? {
                return Ok((aside, stored));
            }
        }
        // Put back meanwhile.
        if let Some(stored) = self.store.get(&at, CHUNK + 1).await? {
            return Ok((at, stored));
        }
        Err(says(format!(
            "{} is missing: the backups that need it cannot be restored whole; somebody else may have removed it",
            self.store.shown(&at)
        )))
    }

    /// Whether a list names a chunk that was moved out of the way, and that nobody has written again since.
    ///
    /// # Errors
    /// A sentence, when that cannot be told.
    pub async fn lacks(&self, index: &Index) -> Result<bool, StorageFailure> {
        let mut damaged = Vec::new();
        let note = |object: Object| {
            damaged.extend(object.key.rsplit_once('/').and_then(|(_, name)| parse(name)));
        };
        self.store.each("damaged", note).await?;
        for id in damaged {
            let named = index.chunks.contains(&Some(id));
            if named && self.store.head(&key(&id)).await?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads a chunk once more and moves it out of the way if it is damaged, so that the next backup that reads the same
    /// content from a disk writes it again, which heals all that name it. Tells whether it was.
    ///
    /// # Errors
    /// A sentence, when it cannot be read or moved.
    pub async fn condemn(&self, id: &ChunkId) -> Result<bool, StorageFailure> {
        let (at, stored) = self.find(id).await?;
        if self.check(id, &at, stored).await.is_ok() {
            return Ok(false);
        }
        self.store.rename(&at, &format!("damaged/{}", hex(id))).await
    }
}
