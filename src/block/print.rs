//! `--print-graph`: the graph as people draw it.
//!
//! Three forms of one picture: nodes with their driver, size, generic and own options in force; edges with the option
//! that defined them and the child's role. Nodes come in the order of the tree, every node's options once.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Graph, Node};
use crate::qapi::Options;

/// The forms of `--print-graph=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A tree for people.
    Text,
    /// For programs: `{"nodes": [...], "edges": [...]}`.
    Json,
    /// For graphviz.
    Dot,
}

/// The whole graph in `format`, with a newline at its end.
pub fn print(graph: &Graph, format: Format) -> String {
    match format {
        Format::Text => text(graph),
        Format::Json => format!("{:#}\n", json(graph)),
        Format::Dot => dot(graph),
    }
}

/// The generic options in force, as the user would write them.
fn generic(node: &Node) -> Options {
    let on = node.in_force();
    let discard = if on.discard_unmap { "unmap" } else { "ignore" };
    [
        ("read-only", Value::from(on.read_only)),
        ("auto-read-only", Value::from(on.auto_read_only)),
        ("force-share", Value::from(on.force_share)),
        ("cache", json!({ "direct": on.cache_direct, "no-flush": on.cache_no_flush })),
        ("discard", Value::from(discard)),
        ("detect-zeroes", Value::from(on.detect_zeroes.name())),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into_iter()
    .collect()
}

fn json(graph: &Graph) -> Value {
    let nodes = graph.nodes();
    let edges = nodes.iter().flat_map(|node| {
        node.driver().edges().iter().map(|edge| {
            json!({
                "parent": node.name(),
                "child": edge.node.name(),
                "name": edge.name,
                "role": edge.role.name(),
            })
        })
    });
    let edges: Vec<Value> = edges.collect();
    let nodes: Vec<Value> = nodes.iter().map(|node| json_node(node)).collect();
    json!({ "nodes": nodes, "edges": edges })
}

fn json_node(node: &Node) -> Value {
    let limits = node.driver().limits();
    let mut object = Map::new();
    object.insert("node-name".into(), node.name().into());
    object.insert("driver".into(), node.def().name.into());
    object.insert("size".into(), node.len().into());
    object.insert("request-alignment".into(), limits.request_align.into());
    object.append(&mut generic(node));
    object.insert("options".into(), node.driver().options_in_force().into());
    object.into()
}

/// Writes options on one line: `a=1, cache.direct=true`; those that say nothing (`false`, `off`) are left out.
fn one_line(options: &Options) -> String {
    fn flatten(prefix: &str, options: &Options, out: &mut Vec<String>) {
        for (name, value) in options {
            match value {
                Value::Object(inner) => flatten(&format!("{prefix}{name}."), inner, out),
                Value::Bool(false) => {}
                Value::Bool(true) => out.push(format!("{prefix}{name}=on")),
                Value::String(s) if s == "off" => {}
                Value::String(s) => out.push(format!("{prefix}{name}={s}")),
                other => out.push(format!("{prefix}{name}={other}")),
            }
        }
    }
    let mut out = Vec::new();
    flatten("", options, &mut out);
    out.join(", ")
}

/// `64 MiB (67108864 bytes)`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = ((63 - (bytes | 1).leading_zeros()) / 10) as usize;
    if unit == 0 {
        return format!("{bytes} bytes");
    }
    let (scale, rest) = (1u64 << (10 * unit), bytes % (1u64 << (10 * unit)));
    let whole = bytes / scale;
    // Two digits, rounded down; none if there is nothing behind the point.
    let hundredths = u128::from(rest) * 100 / u128::from(scale);
    let point = if rest == 0 { String::new() } else { format!(".{hundredths:02}") };
    format!("{whole}{point} {} ({bytes} bytes)", UNITS[unit])
}

fn text(graph: &Graph) -> String {
    let mut out = String::new();
    let mut seen = BTreeSet::new();
    for root in graph.roots() {
        text_node(&mut out, &mut seen, &root, ["", ""], "");
    }
    out
}

/// One node and what is below it. `indent`: what stands before its first line, and before the others.
fn text_node(
    out: &mut String,
    seen: &mut BTreeSet<String>,
    node: &Arc<Node>,
    indent: [&str; 2],
    label: &str,
) {
    let [first, other] = indent;
    let (name, driver) = (node.name(), node.def().name);
    if !seen.insert(name.to_owned()) {
        out.push_str(&format!("{first}{label}{name} (see above)\n"));
        return;
    }
    let edges = node.driver().edges();
    let bar = if edges.is_empty() { " " } else { "│" };
    out.push_str(&format!("{first}{label}{name} ({driver}), {}\n", size(node.len())));
    for options in [generic(node), node.driver().options_in_force()] {
        let line = one_line(&options);
        if !line.is_empty() {
            out.push_str(&format!("{other}{bar}   {line}\n"));
        }
    }
    for (i, edge) in edges.iter().enumerate() {
        let last = i + 1 == edges.len();
        let (branch, below) = if last { ("└── ", "    ") } else { ("├── ", "│   ") };
        let indent = [format!("{other}{branch}"), format!("{other}{below}")];
        let label = format!("{} [{}]: ", edge.name, edge.role.name());
        text_node(out, seen, &edge.node, [&indent[0], &indent[1]], &label);
    }
}

fn dot(graph: &Graph) -> String {
    let quote = |s: &str| format!("\"{}\"", s.replace('\\', "\\\\").replace('"', "\\\""));
    let mut out = String::from("digraph block {\n  node [shape=box, fontname=monospace];\n");
    let nodes = graph.nodes();
    for node in &nodes {
        let options = [generic(node), node.driver().options_in_force()];
        let [generic, own] = options.map(|o| one_line(&o));
        let head = format!("{}\n{}, {}", node.name(), node.def().name, size(node.len()));
        let lines = [head, generic, own].into_iter().filter(|l| !l.is_empty());
        let label = quote(&lines.collect::<Vec<_>>().join("\n")).replace('\n', "\\n");
        // Writing to a String does not fail.
        let _ = writeln!(out, "  {} [label={label}];", quote(node.name()));
    }
    for node in &nodes {
        for edge in node.driver().edges() {
            let (from, to) = (quote(node.name()), quote(edge.node.name()));
            let label = quote(&format!("{} ({})", edge.name, edge.role.name()));
            let _ = writeln!(out, "  {from} -> {to} [label={label}];");
        }
    }
    out.push_str("}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Arc<Graph> {
        let graph = Graph::new();
        let Value::Object(options) = json!({
            "driver": "raw", "node-name": "top", "cache": { "direct": true },
            "file": { "driver": "null-co", "node-name": "leaf", "size": 1_572_864 },
        }) else {
            unreachable!("an object")
        };
        graph.add(options).unwrap();
        graph
    }

    #[test]
    fn a_tree_for_people() {
        let text = print(&sample(), Format::Text);
        let want = "top (raw), 1.50 MiB (1572864 bytes)\n\
                    │   cache.direct=on, discard=ignore\n\
                    └── file [filtered]: leaf (null-co), 1.50 MiB (1572864 bytes)\n\
                    \x20       cache.direct=on, discard=unmap\n\
                    \x20       size=1572864, latency-ns=0\n";
        assert_eq!(text, want);
    }

    #[test]
    fn json_for_programs() {
        let json: Value = serde_json::from_str(&print(&sample(), Format::Json)).unwrap();
        assert_eq!(json["nodes"][0]["node-name"], "top");
        assert_eq!(json["nodes"][1]["options"]["size"], 1_572_864);
        assert_eq!(json["nodes"][1]["cache"]["direct"], true);
        let edge = json!({ "parent": "top", "child": "leaf", "name": "file", "role": "filtered" });
        assert_eq!(json["edges"], json!([edge]));
    }

    #[test]
    fn dot_for_graphviz() {
        let dot = print(&sample(), Format::Dot);
        assert!(dot.contains("  \"top\" -> \"leaf\" [label=\"file (filtered)\"];\n"), "{dot}");
        assert!(dot.contains("\"leaf\" [label=\"leaf\\nnull-co, 1.50 MiB (1572864 bytes)\\n"));
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(512), "512 bytes");
        assert_eq!(size(1 << 30), "1 GiB (1073741824 bytes)");
        assert_eq!(size(u64::MAX), "15.99 EiB (18446744073709551615 bytes)");
    }
}
