//! Reading what a newer version may have written: fields that this version does not know are passed over.
//!
//! People's manifests and requests are read strictly, since a field that is passed over there is a mistake that nobody
//! sees. What stands in the store was written by a daemon, perhaps a newer one while the cluster is being upgraded. An
//! object that is changed keeps such fields.

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

/// Unknown fields that are passed over in one record; more than that is no record of any version.
const MOST: usize = 256;

/// Reads JSON.
///
/// # Errors
/// When it is no JSON, or has an unknown value where this version must know it: a new variant of an enumeration, say.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    read_noting(bytes).map(|(read, _)| read)
}

/// Reads JSON, and gives it whole when a part of it was passed over.
///
/// # Errors
/// As [`read`].
pub fn read_noting<T: DeserializeOwned>(
    bytes: &[u8],
) -> Result<(T, Option<Value>), serde_json::Error> {
    let strict = match serde_json::from_slice(bytes) {
        Ok(value) => return Ok((value, None)),
        Err(error) => error,
    };
    let whole: Value = serde_json::from_slice(bytes)?;
    let mut value = whole.clone();
    for _ in 0..MOST {
        let error = match serde_path_to_error::deserialize(&value) {
            Ok(read) => return Ok((read, Some(whole))),
            Err(error) => error,
        };
        let said = error.inner().to_string();
        let field = said.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
        let path: Vec<&Segment> = error.path().iter().collect();
        if !field.is_some_and(|field| remove(&mut value, &path, field)) {
            break;
        }
    }
    Err(strict)
}

/// Puts into `now` what `whole` has and this version does not know. `known` is what this version read of `whole`, and
/// `now` is that with a change. A list that was changed comes out as it was changed: which of its elements is which is
/// not known.
pub fn put_back(now: &mut Value, whole: &Value, known: &Value) {
    if now == known {
        now.clone_from(whole);
        return;
    }
    let (Value::Object(now), Value::Object(whole), Value::Object(known)) = (now, whole, known)
    else {
        return;
    };
    for (field, was) in whole {
        match (now.get_mut(field), known.get(field)) {
            (Some(now), Some(known)) => put_back(now, was, known),
            (None, None) => _ = now.insert(field.clone(), was.clone()),
            // Set or taken away by the change.
            (Some(_), None) | (None, Some(_)) => {}
        }
    }
}

/// Removes the field at a path that ends in its name or in the object that has it.
fn remove(value: &mut Value, path: &[&Segment], field: &str) -> bool {
    let (to, last) = match path.split_last() {
        Some((Segment::Map { key }, to)) if key == field => (to, true),
        _ => (path, false),
    };
    let removed = at(value, to).and_then(Value::as_object_mut).and_then(|o| o.remove(field));
    // The object may itself be called like the field that is unknown in it.
    removed.is_some()
        || last
            && at(value, path)
                .and_then(Value::as_object_mut)
                .is_some_and(|o| o.remove(field).is_some())
}

fn at<'a>(value: &'a mut Value, path: &[&Segment]) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |value, segment| match segment {
        Segment::Map { key } => value.get_mut(key.as_str()),
        Segment::Seq { index } => value.get_mut(*index),
        Segment::Enum { variant } => value.get_mut(variant.as_str()),
        Segment::Unknown => None,
    })
}
