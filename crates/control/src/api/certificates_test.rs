//! Certificates over the API: what is refused, what is sealed, and that no key ever comes out.

use super::{
    auth::{Role, now_ms},
    testing::{Answer, World, name},
};
use axum::http::StatusCode;
use haven_model::{Object, ObjectRef, keys, object::Kind};
use haven_store::{
    certificate::Key,
    seal::{ClusterKey, Plain},
    testing::{Signed, Signer},
};
use serde_json::{Value, json};

const SHOP: &str = "/v1/objects/certificate/shop";

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn manifest(chain: &str, key: &str) -> String {
    let key = if key.contains('\n') { format!("|\n{}", indented(key)) } else { format!("{key}\n") };
    format!("kind: Certificate\nname: shop\nchain: |\n{}key: {key}", indented(chain))
}

/// A certificate that can be applied.
pub(super) fn any_certificate() -> String {
    let one = Signer::new("Test authority").sign("shop.test", 90);
    manifest(&one.leaf, &one.key)
}

fn service(certificate: &str) -> String {
    format!(
        "kind: Service\nname: web\nreplicas: 1\ntemplate: {{spec: {{memory: 64MiB, networks: [{{network: front}}]}}}}\n\
         frontend:\n  address: 10.0.0.100\n  port: 443\n  tls:\n    certificate: {certificate}\n"
    )
}

/// What the answer says of each object.
fn outcomes(answer: Answer) -> Vec<String> {
    let body = answer.ok();
    let of = |one: &Value| one["outcome"].as_str().unwrap().to_owned();
    body.as_array().unwrap().iter().map(of).collect()
}

/// `line:column message` of each problem.
fn problems(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{answer:?}");
    let said = |p: &Value| {
        assert_ne!(p["hint"], "", "{p}");
        format!("{}:{} {}", p["line"], p["column"], p["message"].as_str().unwrap())
    };
    answer.body["problems"].as_array().unwrap().iter().map(said).collect()
}

/// The key of the certificate as it stands in the store.
async fn stored(world: &World) -> String {
    let key = keys::object(&ObjectRef::new(Kind::Certificate, name("shop")));
    let record = world.state.store.get(&key).await.unwrap().unwrap();
    let record: Value = serde_json::from_slice(&record.value).unwrap();
    record["spec"]["key"].as_str().unwrap().to_owned()
}

fn opened(world: &World, sealed: &str) -> Plain {
    let of = ObjectRef::new(Kind::Certificate, name("shop"));
    world.state.secrets.as_ref().unwrap().open(&of, sealed).unwrap()
}

/// The middle of a key: what must never be seen again.
fn core(key: &str) -> &str {
    key.lines().nth(1).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_sealed_before_it_is_written_and_never_comes_out() {
    let Some(world) = World::start().await else { return };
    let ca = Signer::new("Test authority");
    let one = ca.sign("shop.test", 90);
    let chain = format!("{}{}", one.leaf, ca.certificate);
    let mut said = Vec::new();
    let created = world.apply(&manifest(&chain, &one.key)).await;
    said.push(created.body.to_string());
    assert_eq!(outcomes(created), ["created"]);
    let sealed = stored(&world).await;
    assert!(sealed.starts_with("sealed:v1:"), "{sealed}");
    assert!(
        Key::read(&opened(&world, &sealed)).unwrap()
            == Key::read(&Plain::new(one.key.clone())).unwrap()
    );
    world.state.current().await.unwrap();
    let wrong = world.apply(&manifest(&chain, &ca.sign("shop.test", 90).key)).await;
    said.push(wrong.body.to_string());
    let item = world.operate("GET", SHOP, "").await.ok();
    assert_eq!(item["spec"], json!({"chain": chain, "key": "sealed"}));
    let item_again = world.operate("PUT", SHOP, item.to_string()).await.ok();
    said.extend([item.to_string(), item_again.to_string()]);
    for path in
        ["/v1/objects/certificate", "/v1/explain/certificate/shop", "/v1/events", "/v1/status"]
    {
        said.push(world.operate("GET", path, "").await.ok().to_string());
    }
    said.push(world.ask(world.token(Role::Admin), "GET", "/v1/audit", "").await.ok().to_string());
    said.push(world.operate("DELETE", SHOP, "").await.ok().to_string());
    for text in &said {
        for secret in [core(&one.key), "PRIVATE KEY", "sealed:v1"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
    // Nor is it anywhere in the store.
    let all = world.state.store.range(keys::ROOT, None, 1000, 0).await.unwrap();
    assert!(!all.kvs.is_empty());
    for kv in all.kvs {
        let value = String::from_utf8_lossy(&kv.value).into_owned();
        assert!(!value.contains(core(&one.key)), "{}: {value}", kv.key);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_is_unchanged_and_sealed_keeps_the_one_there() {
    let Some(world) = World::start().await else { return };
    let ca = Signer::new("Test authority");
    let one = ca.sign("shop.test", 90);
    let apply = async |chain: &str, key: &str| {
        world.state.current().await.unwrap();
        world.apply(&manifest(chain, key)).await
    };
    let none = apply(&one.leaf, "sealed").await;
    assert_eq!(
        problems(&none),
        [format!(
            "{}:6 `key` is `sealed`, and there is no certificate `shop` yet",
            4 + one.leaf.lines().count()
        )]
    );
    assert_eq!(outcomes(apply(&one.leaf, &one.key).await), ["created"]);
    let sealed = stored(&world).await;
    assert_eq!(outcomes(apply(&one.leaf, &one.key).await), ["unchanged"]);
    assert_eq!(outcomes(apply(&one.leaf, "sealed").await), ["unchanged"]);
    assert_eq!(stored(&world).await, sealed);
    // Renewed for the same key: the chain changes, the key stays.
    let renewed = ca.renew(&one, "shop.test", 180);
    assert_eq!(outcomes(apply(&renewed.leaf, "sealed").await), ["changed"]);
    assert_eq!(stored(&world).await, sealed);
    // Another key comes with another chain, and the one that is kept fits no other.
    let other = ca.sign("shop.test", 90);
    let kept = apply(&other.leaf, "sealed").await;
    assert!(problems(&kept)[0].contains("does not belong to the first certificate"), "{kept:?}");
    assert_eq!(outcomes(apply(&other.leaf, &other.key).await), ["changed"]);
    let now = stored(&world).await;
    assert_ne!(now, sealed);
    assert!(opened(&world, &now).expose().contains(core(&other.key)));
    // What `get` gives is what `apply` and a PUT take.
    world.state.current().await.unwrap();
    let item = world.operate("GET", SHOP, "").await.ok();
    world.operate("PUT", SHOP, item.to_string()).await.ok();
    assert_eq!(stored(&world).await, now);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_certificate_is_said_at_its_place() {
    let Some(world) = World::start().await else { return };
    let ca = Signer::new("Test authority");
    let Signed { leaf, key } = ca.sign("shop.test", 90);
    let ended = ca.sign("shop.test", -3);
    let reversed = format!("{}{leaf}", ca.certificate);
    let own = |chain: &str| 4 + chain.lines().count();
    for (chain, secret, place, words) in [
        ("no PEM", key.as_str(), "3:8", "holds no certificate"),
        (&leaf, "nothing", &format!("{}:6", own(&leaf)), "no private key that can be read"),
        (
            &leaf,
            &ended.key,
            &format!("{}:6", own(&leaf)),
            "does not belong to the first certificate of the chain, that of `shop.test`",
        ),
        (&ended.leaf, &ended.key, "3:8", "the certificate of `shop.test` ended on 20"),
        (&reversed, &key, "3:8", "the chain is not in order: certificate 1 (`Test authority`)"),
        (&format!("{leaf}{key}"), &key, "3:8", "holds a private key, which everybody"),
        (
            &leaf,
            &key.replace("PRIVATE", "ENCRYPTED PRIVATE"),
            &format!("{}:6", own(&leaf)),
            "has a passphrase",
        ),
    ] {
        let answer = world.apply(&manifest(chain, secret)).await;
        let said = problems(&answer);
        assert!(said.len() == 1 && said[0].starts_with(place), "{words}: {said:?}");
        assert!(said[0].contains(words), "{words}: {said:?}");
        assert!(!answer.body.to_string().contains(core(&key)), "{answer:?}");
    }
    // One that has ended meanwhile does not keep the rest of its file from being applied.
    let spec = haven_model::CertificateSpec { chain: ended.leaf.clone(), key: "sealed:v1:".into() };
    let meta = haven_model::Meta::new(name("shop"), "u".into(), 0);
    world.put(&Object::Certificate(haven_model::object::Stored { meta, spec })).await;
    world.state.current().await.unwrap();
    let chain = ended.leaf.trim_end();
    let text = format!("{}---\nkind: VM\nname: more\nmemory: 64MiB\n", manifest(chain, "sealed"));
    assert_eq!(outcomes(world.apply(&text).await), ["unchanged", "created"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_names_a_certificate_that_is_there_and_keeps_it_there() {
    let Some(world) = World::start().await else { return };
    let network = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n";
    let alone = world.apply(&format!("{network}{}", service("shop"))).await;
    assert_eq!(problems(&alone), ["13:18 certificate `shop` does not exist"]);
    assert_eq!(alone.body["problems"][0]["hint"], "there is no certificate yet");
    // Together with what it needs it is taken, whichever comes first.
    let ca = Signer::new("Test authority");
    let one = ca.sign("shop.test", 12);
    let all = format!("{network}{}---\n{}", service("shop"), manifest(&one.leaf, &one.key));
    assert_eq!(outcomes(world.apply(&all).await), ["created"; 3]);
    let snapshot = world.state.current().await.unwrap();
    let item = world.operate("GET", SHOP, "").await.ok();
    assert_eq!(
        (&item["state"], &item["columns"]["used-by"]),
        (&"ends in 12 days".into(), &"service/web".into())
    );
    assert_eq!(item["columns"]["names"], "shop.test,127.0.0.1");
    let explained = world.operate("GET", "/v1/explain/certificate/shop", "").await.ok();
    assert_eq!(explained[0], "certificate/shop is used by service/web");
    // It is a risk before its end and after it.
    let status = world.operate("GET", "/v1/status", "").await.ok();
    let risk = |status: &Value| {
        status["risks"].as_array().unwrap().iter().find_map(|r| {
            r.as_str()
                .filter(|r| r.starts_with("certificate shop of service/web"))
                .map(str::to_owned)
        })
    };
    let said = risk(&status).unwrap();
    assert!(
        said.contains("ends in 12 days (") && said.contains("haven certificate add shop"),
        "{said}"
    );
    let later = |days: i64| super::certificates::risks(&snapshot, now_ms() + days * 86_400_000);
    assert!(later(13)[0].contains(" ended on "), "{:?}", later(13));
    assert!(later(-30).is_empty(), "{:?}", later(-30));
    // In use it is not deleted, only meant to be.
    world.operate("DELETE", SHOP, "").await.ok();
    let snapshot = world.state.current().await.unwrap();
    let plan = haven_plan::plan(&snapshot, &(world.state.seen)());
    let waits = plan.waiting.iter().find(|w| w.object.kind == Kind::Certificate);
    assert_eq!(
        waits.unwrap().reason,
        "certificate/shop is removed once nothing uses it: service/web"
    );
    assert!(!plan.actions.iter().any(|a| a.object.kind == Kind::Certificate));
    // And no other service may begin to use it.
    let other = service("shop").replace("name: web", "name: two").replace("0.100", "0.101");
    assert_eq!(problems(&world.apply(&other).await), ["9:18 certificate `shop` does not exist"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_the_key_of_secrets_takes_none() {
    let Some(mut world) = World::start().await else { return };
    let one = Signer::new("Test authority").sign("shop.test", 90);
    let without = world.with_secrets(None);
    let refused = without.apply(&manifest(&one.leaf, &one.key)).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{refused:?}");
    assert!(!refused.body.to_string().contains(core(&one.key)));
    // Sealed under another cluster's key, the one that is there cannot be kept for another chain.
    assert_eq!(outcomes(world.apply(&manifest(&one.leaf, &one.key)).await), ["created"]);
    world.state.current().await.unwrap();
    let authority = haven_store::pki::Authority::create("another").unwrap();
    let other = world.with_secrets(Some(ClusterKey::derive(&authority).unwrap()));
    let renewed = Signer::new("Test authority").renew(&one, "shop.test", 180);
    let said = problems(&other.apply(&manifest(&renewed.leaf, "sealed")).await);
    assert!(said[0].contains("the secret of certificate/shop does not open"), "{said:?}");
    // Given again, it is sealed anew.
    assert_eq!(outcomes(other.apply(&manifest(&renewed.leaf, &renewed.key)).await), ["changed"]);
    world.state.secrets.clone_from(&other.state.secrets);
    assert!(opened(&world, &stored(&world).await).expose().contains(core(&one.key)));
}
