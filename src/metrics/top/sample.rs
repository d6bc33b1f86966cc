//! Our own metrics, read back.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// Labels in the order of their names.
type Labels = BTreeMap<String, String>;

/// All samples of one scrape.
pub struct Samples(BTreeMap<String, Vec<(Labels, f64)>>);

impl Samples {
    /// Reads what `text.rs` writes. `None`: it is something else, or has no end.
    pub fn parse(text: &str) -> Option<Samples> {
        let text = text.strip_suffix("# EOF\n")?;
        let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, rest) = line.strip_prefix("vhost_user_blk_")?.split_once('{')?;
            let (labels, value) = rest.rsplit_once("} ")?;
            let sample = (parse_labels(labels)?, value.parse().ok()?);
            all.entry(name.to_owned()).or_default().push(sample);
        }
        Some(Samples(all))
    }

    /// The samples of `name`.
    pub fn all(&self, name: &str) -> &[(Labels, f64)] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The samples of `name` that have all of `labels`.
    pub fn of<'a>(
        &'a self,
        name: &str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a (Labels, f64)> {
        self.all(name)
            .iter()
            .filter(move |(has, _)| labels.iter().all(|(k, v)| has.get(*k).is_some_and(|h| h == v)))
    }

    /// Their sum.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // `sum` of nothing is -0.
        self.of(name, labels).fold(0.0, |sum, (_, value)| sum + value)
    }
}

fn parse_labels(text: &str) -> Option<Labels> {
    let mut labels = Labels::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, c) => value.push(c),
            }
        };
        labels.insert(name.to_owned(), value);
        rest = after[end + 1..].strip_prefix(',').unwrap_or(&after[end + 1..]);
    }
    Some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let text = "# TYPE x counter\nvhost_user_blk_a_total{e=\"a\\\"} b\\\\\\n\",q=\"1\"} 3\n\
                    vhost_user_blk_a_total{e=\"x\",q=\"1\"} 0.5\n# EOF\n";
        let samples = Samples::parse(text).unwrap();
        assert_eq!(samples.sum("a_total", &[("q", "1")]), 3.5);
        assert_eq!(samples.sum("a_total", &[("e", "a\"} b\\\n"), ("q", "1")]), 3.0);
        assert!(Samples::parse(&text[..text.len() - 6]).is_none(), "cut short");
        assert!(Samples::parse("up 1\n# EOF\n").is_none());
    }
}
