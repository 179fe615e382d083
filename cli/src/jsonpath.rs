//! kubectl's JSONPath templates: text with expressions in braces, such as `{.status.url}`,
//! `{.status.conditions[?(@.type=="Ready")].status}` or `{range .items[*]}{.metadata.name}{"\n"}{end}`.

use std::str::FromStr;

use serde_json::Value;
use serde_json_path::JsonPath;

/// A template that has been read.
#[derive(Debug, Clone)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone)]
enum Part {
    Text(String),
    Path(JsonPath),
    Range(JsonPath, Vec<Part>),
}

impl Template {
    /// Fills the template in. Several results of an expression are separated by spaces, as kubectl does.
    pub fn render(&self, value: &Value) -> String {
        render(&self.0, value)
    }
}

fn render(parts: &[Part], value: &Value) -> String {
    parts
        .iter()
        .map(|part| match part {
            Part::Text(text) => text.clone(),
            Part::Path(path) => path.query(value).iter().map(|found| show(found)).collect::<Vec<_>>().join(" "),
            Part::Range(path, body) => path.query(value).iter().map(|found| render(body, found)).collect(),
        })
        .collect()
}

/// Strings as they are, all else as JSON.
fn show(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl FromStr for Template {
    type Err = String;

    /// Without braces the whole text is one expression.
    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains('{') {
            return Ok(Self(vec![Part::Path(path(text)?)]));
        }
        let mut tokens = tokens(text)?.into_iter();
        let (parts, ended) = parse(&mut tokens)?;
        if ended { Err(format!("{text:?}: {{end}} without {{range}}")) } else { Ok(Self(parts)) }
    }
}

enum Token {
    Text(String),
    Expression(String),
}

/// Texts, and expressions without their braces. A brace in quotes or brackets of an expression does not end it.
fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let (mut tokens, mut rest) = (Vec::new(), text);
    while let Some(open) = rest.find('{') {
        if open > 0 {
            tokens.push(Token::Text(rest[..open].to_owned()));
        }
        let inner = &rest[open + 1..];
        let (mut quote, mut escaped, mut close) = (None, false, None);
        for (at, sign) in inner.char_indices() {
            match (quote, sign) {
                _ if escaped => escaped = false,
                (_, '\\') => escaped = true,
                (Some(open), sign) if open == sign => quote = None,
                (None, '"' | '\'') => quote = Some(sign),
                (None, '}') => {
                    close = Some(at);
                    break;
                }
                _ => {}
            }
        }
        let close = close.ok_or_else(|| format!("{text:?}: a brace is not closed"))?;
        tokens.push(Token::Expression(inner[..close].trim().to_owned()));
        rest = &inner[close + 1..];
    }
    if !rest.is_empty() {
        tokens.push(Token::Text(rest.to_owned()));
    }
    Ok(tokens)
}

/// Parts up to the end or to `{end}`; `true` if it was the latter.
fn parse(tokens: &mut std::vec::IntoIter<Token>) -> Result<(Vec<Part>, bool), String> {
    let mut parts = Vec::new();
    while let Some(token) = tokens.next() {
        match token {
            Token::Text(text) => parts.push(Part::Text(text)),
            Token::Expression(end) if end == "end" => return Ok((parts, true)),
            Token::Expression(expression) => {
                if let Some(range) = expression.strip_prefix("range ") {
                    let (body, ended) = parse(tokens)?;
                    if !ended {
                        return Err(format!("{{{expression}}} has no {{end}}"));
                    }
                    parts.push(Part::Range(path(range)?, body));
                } else if expression.starts_with(['"', '\'']) {
                    parts.push(Part::Text(literal(&expression)?));
                } else {
                    parts.push(Part::Path(path(&expression)?));
                }
            }
        }
    }
    Ok((parts, false))
}

/// A quoted text with JSON's escapes.
fn literal(expression: &str) -> Result<String, String> {
    let inner = expression.get(1..expression.len().saturating_sub(1)).unwrap_or_default();
    let quoted = format!("\"{}\"", inner.replace('"', "\\\""));
    serde_json::from_str(&quoted).map_err(|error| format!("{expression}: {error}"))
}

/// An expression as RFC 9535 has it: kubectl leaves out `$`, escapes dots in names, and allows dashes in them.
fn path(expression: &str) -> Result<JsonPath, String> {
    let expression = expression.trim();
    let rest = expression.strip_prefix(['$', '@']).unwrap_or(expression);
    let mut standard = "$".to_owned();
    let mut signs = rest.chars().peekable();
    if signs.peek().is_some_and(|sign| *sign != '.' && *sign != '[') {
        return Err(format!("{expression:?}: expected a path such as {{.status.url}}"));
    }
    while let Some(sign) = signs.next() {
        match sign {
            '[' => brackets(&mut signs, &mut standard),
            '.' => {
                let recursive = signs.next_if_eq(&'.').is_some();
                let mut name = String::new();
                while let Some(sign) = signs.next_if(|sign| *sign != '.' && *sign != '[') {
                    name.push(if sign == '\\' { signs.next().unwrap_or(sign) } else { sign });
                }
                match name.as_str() {
                    "" if recursive => standard.push_str(".."),
                    "" => {}
                    "*" => standard.push_str(if recursive { "..*" } else { ".*" }),
                    name => {
                        standard.push_str(if recursive { ".." } else { "" });
                        standard.push_str(&format!("[{}]", Value::String(name.to_owned())));
                    }
                }
            }
            _ => return Err(format!("{expression:?}: expected a path such as {{.status.url}}")),
        }
    }
    JsonPath::parse(&standard).map_err(|error| format!("{expression:?}: {error}"))
}

/// Copies what is in brackets as it is, nested ones included.
fn brackets(signs: &mut std::iter::Peekable<std::str::Chars<'_>>, standard: &mut String) {
    standard.push('[');
    let (mut depth, mut quote) = (1, None);
    for sign in signs.by_ref() {
        standard.push(sign);
        match (quote, sign) {
            (Some(open), sign) if open == sign => quote = None,
            (None, '"' | '\'') => quote = Some(sign),
            (None, '[') => depth += 1,
            (None, ']') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(template: &str) -> String {
        let value = json!({
            "metadata": {"name": "iris", "annotations": {"a.b/c": "d"}, "dash-ed": 1},
            "status": {"url": "http://iris", "conditions": [
                {"type": "IngressReady", "status": "False"}, {"type": "Ready", "status": "True"},
            ]},
            "items": [{"n": "a"}, {"n": "b"}],
        });
        template.parse::<Template>().unwrap_or_else(|error| panic!("{template}: {error}")).render(&value)
    }

    #[test]
    fn the_usual_templates_of_kubectl_work() {
        for (template, expected) in [
            ("{.status.url}", "http://iris"),
            (".status.url", "http://iris"),
            ("{$.status.url}", "http://iris"),
            ("{.metadata.name} at {.status.url}", "iris at http://iris"),
            (r#"{.status.conditions[?(@.type=="Ready")].status}"#, "True"),
            (r#"{.status.conditions[?(@.type=='Ready')].status}"#, "True"),
            (r"{.metadata.annotations.a\.b/c}", "d"),
            ("{.metadata.dash-ed}", "1"),
            ("{.items[*].n}", "a b"),
            ("{.items[0].n}", "a"),
            ("{.items[-1:].n}", "b"),
            ("{.items[*]['n']}", "a b"),
            (r#"{range .items[*]}{.n}{"\n"}{end}"#, "a\nb\n"),
            ("{..url}", "http://iris"),
            ("{.missing}", ""),
        ] {
            assert_eq!(rendered(template), expected, "{template}");
        }
    }

    #[test]
    fn a_template_that_cannot_be_read_is_refused() {
        for bad in ["{.a", "{range .items[*]}{.n}", "{end}", "{.a[}", "name"] {
            assert!(bad.parse::<Template>().is_err(), "{bad}");
        }
    }
}
