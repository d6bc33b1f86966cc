use serde_json::json;

use super::*;

const UINT16: Kind = Kind::Int { bits: 16, signed: false };
const INT8: Kind = Kind::Int { bits: 8, signed: true };

static MEMBERS: &[OptionSpec] = &[
    OptionSpec::required("name", Kind::Str),
    OptionSpec::optional("flag", Kind::Bool),
    OptionSpec::optional("count", Kind::Int { bits: 64, signed: true }),
    OptionSpec::optional("limit", Kind::Int { bits: 64, signed: false }),
    OptionSpec::optional("small", UINT16),
    OptionSpec::optional("tiny", INT8),
    OptionSpec::optional("size", Kind::Size),
    OptionSpec::optional("word", Kind::Enum(&["one", "two"])),
    OptionSpec::optional("inner", Kind::Struct(&[OptionSpec::optional("flag", Kind::Bool)])),
    OptionSpec::optional("addr", Kind::Union(&schema::SOCKET_ADDRESS)),
    OptionSpec::optional("file", Kind::BlockdevRef),
    OptionSpec::optional("backing", Kind::BlockdevRefOrNull),
    OptionSpec::optional("any", Kind::Any),
];

fn visit(text: &str) -> Result<Value> {
    Input::parse(text, "name")?.visit(&[MEMBERS]).map(Value::Object)
}

fn error(text: &str) -> String {
    visit(text).unwrap_err().message().to_string()
}

#[test]
fn keyval_gets_types() {
    assert_eq!(
        visit("x,flag=on,count=-5,limit=0x10,small=7,tiny=-128,size=4k,word=two,inner.flag=n")
            .unwrap(),
        json!({"name": "x", "flag": true, "count": -5, "limit": 16, "small": 7, "tiny": -128, "size": 4096,
               "word": "two", "inner": {"flag": false}})
    );
    assert_eq!(
        visit("x,addr.type=fd,addr.str=3,file=f,backing=,any.0=1").unwrap(),
        json!({"name": "x", "addr": {"type": "fd", "str": "3"}, "file": "f", "backing": "", "any": ["1"]})
    );
}

#[test]
fn json_keeps_types() {
    let text = r#"{"name":"x","flag":true,"count":-5,"limit":-1,"small":7,"size":4096,"word":"one",
        "inner":{"flag":false},"file":"f","backing":null}"#;
    assert_eq!(
        visit(text).unwrap(),
        json!({"name": "x", "flag": true, "count": -5, "limit": u64::MAX, "small": 7, "size": 4096,
               "word": "one", "inner": {"flag": false}, "file": "f", "backing": null})
    );
}

#[test]
fn keyval_errors_are_qemus() {
    for (text, expected) in [
        ("", "Parameter 'name' is missing"),
        ("flag=x", "Parameter 'name' is missing"),
        ("x,flag=maybe", "Parameter 'flag' expects 'on' or 'off'"),
        ("x,inner.flag=1", "Parameter 'inner.flag' expects 'on' or 'off'"),
        ("x,count=1k", "Parameter 'count' expects integer"),
        ("x,small=x", "Parameter 'small' expects integer"),
        ("x,small=65536", "Parameter 'small' expects uint16_t"),
        ("x,small=-1", "Parameter 'small' expects uint16_t"),
        ("x,tiny=128", "Parameter 'tiny' expects int8_t"),
        ("x,size=1.5", "Parameter 'size' expects size"),
        ("x,word=three", "Parameter 'word' does not accept value 'three'"),
        ("x,word.a=1", "Parameters 'word.*' are unexpected"),
        ("x,inner.flag.a=1", "Parameters 'inner.flag.*' are unexpected"),
        ("x,inner=1", "Invalid parameter type for 'inner', expected: object"),
        ("x,inner.0=1", "Invalid parameter type for 'inner', expected: object"),
        ("x,inner.bogus=1", "Parameter 'inner.bogus' is unexpected"),
        ("x,bogus=1", "Parameter 'bogus' is unexpected"),
        ("x,bogus.a=1", "Parameter 'bogus' is unexpected"),
        ("x,bogus=1,count=x", "Parameter 'count' expects integer"),
        ("x,addr.path=y", "Parameter 'addr.type' is missing"),
        ("x,addr.type=unix", "Parameter 'addr.path' is missing"),
        ("x,addr.type=bogus", "Parameter 'type' does not accept value 'bogus'"),
        ("x,addr.type=fd,addr.str=1,addr.path=x", "Parameter 'addr.path' is unexpected"),
        ("x,file.0=1", "Invalid parameter type for 'file', expected: BlockdevRef"),
        ("x,file.a=1", "Parameter 'file.driver' is missing"),
        ("x,file.driver=bogus", "Parameter 'driver' does not accept value 'bogus'"),
        ("x,file.driver=nbd", "Driver 'nbd' is not supported by vhost-user-blk yet"),
        ("help", "Help is not available for this option"),
    ] {
        assert_eq!(error(text), expected, "{text:?}");
    }
}

#[test]
fn json_errors_are_qemus() {
    for (members, expected) in [
        (r#""flag":"on""#, "Invalid parameter type for 'flag', expected: boolean"),
        (r#""inner":{"flag":1}"#, "Invalid parameter type for 'inner.flag', expected: boolean"),
        (r#""inner":null"#, "Invalid parameter type for 'inner', expected: object"),
        (r#""count":"1""#, "Invalid parameter type for 'count', expected: integer"),
        (r#""count":1.0"#, "Invalid parameter type for 'count', expected: integer"),
        (r#""count":9223372036854775808"#, "Invalid parameter type for 'count', expected: integer"),
        (r#""limit":"1""#, "Parameter 'limit' expects uint64"),
        (r#""limit":1.5"#, "Parameter 'limit' expects uint64"),
        (r#""small":65536"#, "Parameter 'small' expects uint16_t"),
        (r#""size":"4k""#, "Parameter 'size' expects uint64"),
        (r#""word":1"#, "Invalid parameter type for 'word', expected: string"),
        (r#""word":"x""#, "Parameter 'word' does not accept value 'x'"),
        (r#""file":null"#, "Invalid parameter type for 'file', expected: BlockdevRef"),
        (r#""file":{}"#, "Parameter 'file.driver' is missing"),
        (r#""backing":1"#, "Invalid parameter type for 'backing', expected: BlockdevRefOrNull"),
        (r#""inner.flag":true"#, "Parameter 'inner.flag' is unexpected"),
    ] {
        assert_eq!(error(&format!(r#"{{"name":"x",{members}}}"#)), expected, "{members}");
    }
}

#[test]
fn words_choose_a_schema() {
    let mut input = Input::parse("iothread,id=x", "qom-type").unwrap();
    assert_eq!(input.take_word("qom-type").unwrap(), "iothread");
    assert_eq!(Value::Object(input.visit(&[schema::IOTHREAD]).unwrap()), json!({"id": "x"}));
    let mut input = Input::parse(r#"{"qom-type":1}"#, "qom-type").unwrap();
    assert_eq!(
        input.take_word("qom-type").unwrap_err().message(),
        "Invalid parameter type for 'qom-type', expected: string"
    );
}
