//! Reads `cases.txt`.

const CASES: &str = include_str!("cases.txt");
const FILE_NODE: &str = "--blockdev file,node-name=f,filename=disk.raw";
const QCOW2_NODE: &str = "--blockdev qcow2,node-name=q,file.driver=file,file.filename=";
const EXPORT: &str =
    "--export vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path=s,writable=on";

/// One line of `cases.txt`.
pub struct Case {
    pub text: &'static str,
    pub args: Vec<String>,
    /// Why the programs differ.
    pub difference: Option<&'static str>,
}

pub fn cases(section: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut here = false;
    let mut difference = None;
    for text in CASES.lines() {
        if text.starts_with('[') {
            here = text == format!("[{section}]");
        } else if let Some(reason) = text.strip_prefix('!') {
            difference = Some(reason);
        } else if !text.is_empty() && !text.starts_with('#') {
            let reason = difference.take();
            if here {
                cases.push(Case { text, args: split(text), difference: reason });
            }
        }
    }
    assert!(!cases.is_empty());
    cases
}

/// Splits as a shell does, after replacing what is in braces.
pub fn split(text: &str) -> Vec<String> {
    let raw_node = format!("{FILE_NODE} --blockdev raw,node-name=r,file=f");
    let text = text.replace("{F}", FILE_NODE).replace("{R}", &raw_node);
    let text = text.replace("{Q}", QCOW2_NODE).replace("{E}", EXPORT);
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (' ', None) => words.extend(word.take()),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(q)) if c == q => quote = None,
            ('\\', Some('"')) => word.get_or_insert_default().extend(chars.next()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words.iter().map(|word| expand(word)).collect()
}

/// Replaces `{x*3}` by `xxx`.
pub fn expand(word: &str) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some(star) = rest.find('*') {
        let before = &rest[..star];
        let count = rest[star + 1..].split_once('}').and_then(|(n, _)| n.parse::<usize>().ok());
        let (Some(count), Some(c)) = (count, before.chars().next_back()) else { break };
        let start = star - c.len_utf8();
        if !before[..start].ends_with('{') {
            break;
        }
        out.push_str(&before[..start - 1]);
        out.extend(std::iter::repeat_n(c, count));
        rest = rest[star..].split_once('}').map_or("", |(_, rest)| rest);
    }
    out + rest
}
