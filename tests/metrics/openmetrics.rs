//! A strict reader of OpenMetrics 1.0 text, written from the specification: whatever it does not like fails the test.

use std::collections::BTreeSet;

/// One scrape: samples by name (without our prefix) and labels as they stand.
pub struct Scrape {
    pub text: String,
    samples: Vec<(String, String, f64)>,
}

const PREFIX: &str = "vhost_user_blk_";

fn is_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    name.starts_with(first) && name.chars().all(|c| first(c) || c.is_ascii_digit())
}

/// The labels of `text`, checked: name, value with its escapes taken away.
fn labels(text: &str) -> Vec<(String, String)> {
    let (mut all, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").expect("a label");
        assert!(is_name(name) && !name.contains(':'), "{name}");
        let (mut value, mut chars) = (String::new(), after.char_indices());
        let end = loop {
            match chars.next().expect("the value's end") {
                (at, '"') => break at,
                (_, '\\') => match chars.next().expect("an escape").1 {
                    'n' => value.push('\n'),
                    c @ ('\\' | '"') => value.push(c),
                    c => panic!("\\{c} in {text}"),
                },
                (_, c) => value.push(c),
            }
        };
        all.push((name.to_owned(), value));
        rest = &after[end + 1..];
        if !rest.is_empty() {
            rest = rest.strip_prefix(',').expect("a comma");
            assert!(!rest.is_empty(), "a comma at the end");
        }
    }
    let names: BTreeSet<_> = all.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), all.len(), "a label twice: {text}");
    all
}

/// A histogram under way: its labels, the last bound and count.
type Buckets = Option<(String, f64, f64)>;

fn bucket(open: &mut Buckets, suffix: &str, text: &str, value: f64) {
    let le = labels(text).into_iter().find(|(name, _)| name == "le").map(|(_, le)| le);
    let others: Vec<_> = text.split(',').filter(|l| !l.starts_with("le=")).collect();
    let others = others.join(",");
    match (suffix, le) {
        ("_bucket", Some(le)) => {
            let bound: f64 = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
            if let Some((labels, last, below)) =
                open.as_ref().filter(|(_, last, _)| last.is_finite())
            {
                assert_eq!(*labels, others, "a histogram without its end");
                assert!(bound > *last && value >= *below, "{text}: {bound} {last} {value} {below}");
            }
            *open = Some((others, bound, value));
        }
        ("_count", None) => {
            let (labels, last, count) = open.as_ref().expect("buckets before");
            assert_eq!((labels, *count), (&others, value));
            assert!(last.is_infinite());
        }
        ("_sum", None) => assert_eq!(open.take().expect("buckets before").0, others),
        other => panic!("{other:?} in a histogram"),
    }
}

impl Scrape {
    pub fn parse(text: &str) -> Scrape {
        let body = text.strip_suffix("# EOF\n").expect("# EOF at the end");
        assert!(body.ends_with('\n') && !body.contains("# EOF") && !body.contains('\r'));
        let (mut families, mut seen) = (BTreeSet::new(), BTreeSet::new());
        let (mut family, mut kind, mut state) = (String::new(), String::new(), 0);
        let (mut samples, mut open): (Vec<_>, Buckets) = (Vec::new(), None);
        for line in body.lines() {
            if let Some(meta) = line.strip_prefix("# ") {
                let mut words = meta.splitn(3, ' ');
                let [word, name, rest] = [(); 3].map(|()| words.next().expect("three words"));
                let order =
                    ["TYPE", "UNIT", "HELP"].iter().position(|w| *w == word).expect("known") + 1;
                if word == "TYPE" {
                    assert!(is_name(name) && families.insert(name.to_owned()), "{name} twice");
                    let kinds = ["counter", "gauge", "histogram", "info"];
                    assert!(kinds.contains(&rest), "{line}");
                    (family, kind, state) = (name.to_owned(), rest.to_owned(), 0);
                }
                assert!(name == family && order > state, "{line} out of place");
                if word == "UNIT" {
                    assert!(name.ends_with(&format!("_{rest}")), "{line}");
                }
                state = order;
                continue;
            }
            state = 4;
            let (name, rest) = line.split_once('{').expect("labels");
            let (text, value) = rest.rsplit_once("} ").expect("one space and a value");
            let value: f64 = value.parse().expect("a number");
            labels(text);
            assert!(seen.insert((name, text)), "twice: {line}");
            let suffix =
                name.strip_prefix(&*family).unwrap_or_else(|| panic!("{line} in {family}"));
            match (kind.as_str(), suffix) {
                ("counter", "_total") => assert!(value >= 0.0, "{line}"),
                ("gauge", "") => {}
                ("info", "_info") => assert_eq!(value, 1.0),
                ("histogram", suffix) => bucket(&mut open, suffix, text, value),
                other => panic!("{other:?}: {line}"),
            }
            let name = name.strip_prefix(PREFIX).expect("our prefix");
            samples.push((name.to_owned(), text.to_owned(), value));
        }
        assert!(open.is_none(), "a histogram without its end");
        Scrape { text: text.to_owned(), samples }
    }

    /// The sum of the samples of `name` whose labels contain all of `labels`, comma separated.
    pub fn sum(&self, name: &str, labels: &str) -> f64 {
        let has =
            |text: &str| labels.split(',').all(|l| l.is_empty() || text.split(',').any(|t| t == l));
        let of = self.samples.iter().filter(|(n, text, _)| n == name && has(text));
        of.fold(0.0, |sum, (_, _, value)| sum + value)
    }
}
