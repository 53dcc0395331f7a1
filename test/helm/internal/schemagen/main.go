// Schemagen writes the JSON schemas of the kinds that the chart uses. Run it in the folder
// of the module after a change of the versions or the kinds below:
//
//	go generate ./...
//
// It takes the schemas of Kubernetes from its OpenAPI document, and the others from the
// CustomResourceDefinitions of their projects. It downloads the modules that contain these
// files. A schema refuses unknown fields, and has no descriptions and no status.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

//go:generate go run . ../../testdata

// source is a module with schemas, and the kinds to take from it.
type source struct {
	output, module, version string
	// files are paths in the module.
	files []string
	// kinds are in the form apiVersion/kind.
	kinds []string
}

var kubernetes = []string{
	"apps/v1/Deployment", "autoscaling/v2/HorizontalPodAutoscaler", "batch/v1/Job",
	"networking.k8s.io/v1/NetworkPolicy", "policy/v1/PodDisruptionBudget", "v1/Service",
}

// The oldest version of Kubernetes is that of kubeVersion in Chart.yaml.
var sources = []source{
	{"kubernetes-oldest.json", "k8s.io/kubernetes", "v1.30.14", []string{"api/openapi-spec/swagger.json"}, kubernetes},
	{"kubernetes-newest.json", "k8s.io/kubernetes", "v1.37.2", []string{"api/openapi-spec/swagger.json"}, kubernetes},
	{
		"keda.json", "github.com/kedacore/keda/v2", "v2.21.0",
		[]string{"config/crd/bases/keda.sh_scaledobjects.yaml"},
		[]string{"keda.sh/v1alpha1/ScaledObject"},
	},
	{
		"prometheus-operator.json", "github.com/prometheus-operator/prometheus-operator", "v0.85.0",
		[]string{
			"example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
			"example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
		},
		[]string{"monitoring.coreos.com/v1/PrometheusRule", "monitoring.coreos.com/v1/ServiceMonitor"},
	},
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "schemagen:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: schemagen FOLDER")
	}
	for _, s := range sources {
		schema, err := s.schema()
		if err != nil {
			return fmt.Errorf("%s: %w", s.output, err)
		}
		if err := os.WriteFile(filepath.Join(args[0], s.output), schema, 0o600); err != nil { //nolint:gosec // the caller chooses the folder
			return fmt.Errorf("write the schema: %w", err)
		}
	}
	return nil
}

// object is a JSON object.
type object = map[string]any

// schema returns a JSON schema that has each kind under $defs.
func (s source) schema() ([]byte, error) {
	dir, err := download(s.module + "@" + s.version)
	if err != nil {
		return nil, err
	}
	definitions := object{}
	for _, file := range s.files {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return nil, fmt.Errorf("read: %w", err)
		}
		var document object
		if err := yaml.Unmarshal(text, &document); err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		if of(document, "spec") != nil {
			addCustom(definitions, document)
		} else {
			addBuiltin(definitions, document)
		}
	}
	used := object{}
	for _, kind := range s.kinds {
		if definitions[kind] == nil {
			return nil, fmt.Errorf("%s is missing", kind)
		}
		collect(used, definitions, kind)
	}
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(object{
		"$comment": fmt.Sprintf("Written by schemagen from %s %s, Apache License 2.0", s.module, s.version),
		"$defs":    used,
	}); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	// Each definition has a line, so that a diff shows the changed kinds.
	return bytes.ReplaceAll(text.Bytes(), []byte(`,"`+linePrefix), []byte(",\n\""+linePrefix)), nil
}

// linePrefix begins the names of Kubernetes' definitions.
const linePrefix = "io.k8s."

func download(module string) (string, error) {
	command := exec.Command("go", "mod", "download", "-json", module) //nolint:gosec,noctx // a constant of this file; it ends by itself
	command.Stderr = os.Stderr
	output, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("download %s: %w", module, err)
	}
	var downloaded struct {
		Dir string `json:"Dir"` //nolint:tagliatelle // the name in the output of go
	}
	if err := json.Unmarshal(output, &downloaded); err != nil {
		return "", fmt.Errorf("download %s: %w", module, err)
	}
	return downloaded.Dir, nil
}

func of(o object, path ...string) any {
	var value any = o
	for _, name := range path {
		inner, ok := value.(object)
		if !ok {
			return nil
		}
		value = inner[name]
	}
	return value
}

// addBuiltin adds the definitions of an OpenAPI document, and each kind under its name.
func addBuiltin(definitions, document object) {
	found, _ := of(document, "definitions").(object)
	for name, definition := range found {
		simplified := simplify(definition)
		definitions[name] = simplified
		kinds, _ := of(found, name, "x-kubernetes-group-version-kind").([]any)
		for _, kind := range kinds {
			k, ok := kind.(object)
			if !ok {
				continue
			}
			addKind(definitions, fmt.Sprint(k["group"]), fmt.Sprint(k["version"]), fmt.Sprint(k["kind"]), simplified)
		}
	}
	// JSON numbers are also quantities: {cpu: 1}.
	definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = object{"type": []any{"string", "number"}}
}

// addCustom adds the kind of a CustomResourceDefinition.
func addCustom(definitions, document object) {
	versions, _ := of(document, "spec", "versions").([]any)
	for _, version := range versions {
		v, ok := version.(object)
		if !ok {
			continue
		}
		schema := simplify(of(v, "schema", "openAPIV3Schema"))
		addKind(definitions, fmt.Sprint(of(document, "spec", "group")), fmt.Sprint(v["name"]), fmt.Sprint(of(document, "spec", "names", "kind")), schema)
	}
}

// addKind adds a kind. Each of its objects has a name.
func addKind(definitions object, group, version, kind string, schema any) {
	name := strings.TrimPrefix(group+"/"+version, "/")
	o, ok := schema.(object)
	if !ok {
		return
	}
	o = maps.Clone(o)
	properties, _ := o["properties"].(object)
	properties = maps.Clone(properties)
	delete(properties, "status")
	properties["apiVersion"] = object{"const": name}
	properties["kind"] = object{"const": kind}
	properties["metadata"] = object{
		"type": "object", "additionalProperties": false, "required": []any{"name", "namespace", "labels"},
		"properties": object{
			"name":        object{"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"},
			"namespace":   object{"type": "string"},
			"labels":      object{"type": "object", "additionalProperties": object{"type": "string", "pattern": "^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"}},
			"annotations": object{"type": "object", "additionalProperties": object{"type": "string"}},
		},
	}
	o["properties"] = properties
	o["required"] = []any{"apiVersion", "kind", "metadata", "spec"}
	definitions[name+"/"+kind] = o
}

// kept are the keywords that a simplified schema keeps.
var kept = []string{
	"additionalProperties", "allOf", "anyOf", "enum", "items", "maxItems", "maxLength", "maximum", "minItems", "minLength",
	"minimum", "not", "oneOf", "pattern", "properties", "required", "type",
}

// simplify returns a schema without descriptions that refuses unknown fields.
func simplify(schema any) any {
	o, ok := schema.(object)
	if !ok {
		return schema
	}
	if target, ok := o["$ref"].(string); ok {
		return object{"$ref": "#/$defs/" + strings.TrimPrefix(target, "#/definitions/")}
	}
	if o["format"] == "int-or-string" || o["x-kubernetes-int-or-string"] == true {
		return object{"type": []any{"integer", "string"}}
	}
	result := object{}
	for _, keyword := range kept {
		switch value := o[keyword].(type) {
		case nil:
		case object:
			if keyword == "properties" {
				properties := object{}
				for name, property := range value {
					properties[name] = simplify(property)
				}
				result[keyword] = properties
				continue
			}
			result[keyword] = simplify(value)
		case []any:
			if slices.Contains([]string{"allOf", "anyOf", "oneOf"}, keyword) {
				alternatives := make([]any, len(value))
				for i, alternative := range value {
					alternatives[i] = simplify(alternative)
				}
				result[keyword] = alternatives
				continue
			}
			result[keyword] = value
		default:
			result[keyword] = value
		}
	}
	if result["properties"] != nil && result["additionalProperties"] == nil && o["x-kubernetes-preserve-unknown-fields"] == nil {
		result["additionalProperties"] = false
	}
	return result
}

// collect adds a definition and its references.
func collect(used, definitions object, name string) {
	if used[name] != nil {
		return
	}
	used[name] = definitions[name]
	var visit func(any)
	visit = func(value any) {
		switch v := value.(type) {
		case object:
			if target, ok := v["$ref"].(string); ok {
				collect(used, definitions, strings.TrimPrefix(target, "#/$defs/"))
			}
			for _, inner := range v {
				visit(inner)
			}
		case []any:
			for _, inner := range v {
				visit(inner)
			}
		}
	}
	visit(definitions[name])
}
