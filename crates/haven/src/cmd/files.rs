//! Manifests from files, directories and standard input.

use crate::failure::Failure;
use haven_model::{
    Object, ObjectRef,
    api::ManifestFile,
    manifest::{LARGEST, Manifest, parse},
    object::Kind,
};
use std::{
    io::Read,
    path::{Path, PathBuf},
};

/// Reads manifests.
pub fn read(paths: &[PathBuf]) -> Result<Vec<ManifestFile>, Failure> {
    let mut files = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            let limit = LARGEST as u64 + 1;
            std::io::stdin().take(limit).read_to_string(&mut text).map_err(|error| {
                Failure::bad(
                    format!("standard input cannot be read: {error}"),
                    "give it UTF-8 text",
                )
            })?;
            files.push(ManifestFile { name: "-".into(), text });
        } else if path.is_dir() {
            files.extend(inside(path)?);
        } else {
            files.push(one(path)?);
        }
    }
    let size: usize = files.iter().map(|file| file.text.len()).sum();
    if size > LARGEST {
        return Err(Failure::bad(
            format!("the manifests are {size} bytes long together, and at most {LARGEST} are read"),
            "apply them in several steps; images are imported with `haven image import`",
        ));
    }
    Ok(files)
}

/// The manifests of a directory, without those of directories in it.
fn inside(path: &Path) -> Result<Vec<ManifestFile>, Failure> {
    let shown = path.display();
    let entries = std::fs::read_dir(path).map_err(|error| {
        Failure::bad(format!("{shown} cannot be read: {error}"), "check the path and its owner")
    })?;
    let manifest = |p: &PathBuf| p.extension().is_some_and(|e| e == "yaml" || e == "yml");
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|p| manifest(p) && p.is_file())
        .collect();
    found.sort();
    if found.is_empty() {
        let message = format!("{shown} holds no manifest");
        return Err(Failure::bad(message, "manifests are files whose names end in .yaml or .yml"));
    }
    found.iter().map(|path| one(path)).collect()
}

/// Reads one file.
pub fn one(path: &Path) -> Result<ManifestFile, Failure> {
    let size = std::fs::metadata(path).map_or(0, |m| m.len());
    if size > LARGEST as u64 {
        return Err(Failure::bad(
            format!("{} is {size} bytes long, more than a manifest may be", path.display()),
            "apply it in several steps; images are imported with `haven image import`",
        ));
    }
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::bad(format!("{} cannot be read: {e}", path.display()), "check the path")
    })?;
    Ok(ManifestFile { name: path.display().to_string(), text })
}

/// The objects in manifests.
pub fn objects(files: Vec<ManifestFile>) -> Result<Vec<Manifest>, Failure> {
    let files: Vec<(String, String)> = files.into_iter().map(|f| (f.name, f.text)).collect();
    parse(&files).map_err(Failure::manifests)
}

/// What manifests name, in the order in which it can go: what uses something before what is used.
pub fn to_delete(manifests: &[Manifest]) -> Result<Vec<ObjectRef>, Failure> {
    let host = manifests.iter().find(|m| matches!(m.object, Object::Host(_)));
    if let Some(host) = host {
        let name = &host.object.meta().name;
        return Err(Failure::bad(
            format!("{} line {} names host/{name}; nothing was deleted", host.file, host.line),
            format!("hosts are removed one by one: `haven host remove {name}`"),
        ));
    }
    let mut all: Vec<ObjectRef> = manifests.iter().map(|m| m.object.reference()).collect();
    let order = |kind: Kind| Kind::ALL.iter().position(|k| *k == kind);
    all.sort_by_key(|of| std::cmp::Reverse(order(of.kind)));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::{objects, read, to_delete};
    use haven_model::api::ManifestFile;

    fn order(text: &str) -> Result<String, crate::failure::Failure> {
        let file = ManifestFile { name: "x.yaml".into(), text: text.into() };
        let all = to_delete(&objects(vec![file])?)?;
        Ok(all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn what_uses_goes_before_what_is_used() {
        let text = "kind: Network\nname: n\nsubnet: 10.0.0.0/24\n---\nkind: VM\nname: v\nmemory: 1GiB\n---\nkind: Pool\nname: p\ndriver: local\npath: /p\n---\nkind: Service\nname: s\nreplicas: 1\ntemplate:\n  spec:\n    memory: 1GiB\n";
        assert_eq!(order(text).unwrap(), "service/s vm/v network/n pool/p");
    }

    #[test]
    fn a_host_is_never_deleted_by_a_file() {
        let said = order("kind: Host\nname: host1\naddress: 10.0.0.1\n").unwrap_err();
        insta::assert_snapshot!(said);
    }

    #[test]
    fn a_wrong_manifest_is_shown_with_its_place() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.yaml"), "kind: VM\nname: web\nmemory: 12megs\n")
            .unwrap();
        std::fs::write(directory.path().join("notes.txt"), "not a manifest").unwrap();
        let files = read(&[directory.path().to_owned()]).unwrap();
        let said = objects(files).unwrap_err();
        let path = directory.path().display().to_string();
        insta::assert_snapshot!(said.to_string().replace(&path, "DIR"));
        assert_eq!(said.code, 2);
    }

    #[test]
    fn a_directory_without_manifests_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(&[directory.path().to_owned()]).unwrap_err().code, 2);
    }
}
