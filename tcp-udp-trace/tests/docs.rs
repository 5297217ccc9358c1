//! Checks docs/events.md: the library writes its examples, and it names every field.

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::{Deserializer, Value};
use tcp_udp_trace::{Event, EventKind, Kind, Stats};

fn read(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the JSON values of the page's code blocks.
fn examples(page: &str) -> Vec<Value> {
    let blocks = page.split("```json\n").skip(1);
    let blocks = blocks.filter_map(|rest| rest.split_once("```"));
    blocks
        .flat_map(|(block, _)| Deserializer::from_str(block).into_iter::<Value>())
        .map(|value| value.expect("JSON"))
        .collect()
}

/// Adds the names of all fields, at any depth.
fn fields(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                names.insert(name.clone());
                fields(value, names);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| fields(value, names)),
        _ => {}
    }
}

#[test]
fn the_library_writes_the_examples() {
    let examples = examples(&read("docs/events.md"));
    let mut shown = BTreeSet::new();
    for example in &examples {
        let again = if example.get("kind").is_some() {
            serde_json::to_value(
                serde_json::from_value::<Event>(example.clone()).expect("an event"),
            )
        } else {
            let kind: EventKind = serde_json::from_value(example.clone()).expect("a kind");
            shown.insert(example["type"].to_string());
            serde_json::to_value(kind)
        };
        assert_eq!(again.expect("can be written"), *example);
    }
    let kinds = Kind::ALL.iter().map(|kind| kind.name()).chain(["lost"]);
    let kinds: BTreeSet<_> = kinds.map(|name| format!("\"{name}\"")).collect();
    assert_eq!(shown, kinds);
}

#[test]
fn every_field_is_named() {
    let page = read("docs/events.md");
    let mut names = BTreeSet::new();
    // Events that have every field among them.
    for seed in [
        "tcp4_sample",
        "udp4_sample",
        "details",
        "lost",
        "tcp4_reset",
        "tcp4_state_change_error",
    ] {
        let seed = read(&format!("fuzz/corpus/event_json/{seed}"));
        fields(&serde_json::from_str(&seed).expect("JSON"), &mut names);
    }
    fields(
        &serde_json::to_value(Stats::default()).expect("JSON"),
        &mut names,
    );
    assert!(names.len() > 100, "{names:?}");
    let missing: Vec<_> = names
        .iter()
        .filter(|name| !page.contains(&format!("`{name}`")))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/events.md does not name {missing:?}"
    );
}
