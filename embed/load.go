package embed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"
)

// EnvPrefix is the prefix of the environment variables. The rest of a name is the
// name of the flag in capitals, with _ for -.
const EnvPrefix = "SNAPSHOTD_"

// EnvName returns the environment variable of a flag.
func EnvName(flag string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// LoadConfig returns the configuration that results from the defaults, then the
// YAML file at path unless it is empty, then the environment, in which an empty
// variable counts as unset, then the changed flags. The flags are those that
// [Config.Flags] added to any Config; flags and env may be nil. The error names every
// value of a wrong form; see [Config.Validate] for values out of bounds.
func LoadConfig(path string, env func(name string) (string, bool), flags *pflag.FlagSet) (Config, error) {
	c := Default()
	var errs []error
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return c, fmt.Errorf("read configuration: %w", err)
		}
		if err := yaml.UnmarshalStrict(data, &c); err != nil {
			errs = append(errs, fmt.Errorf("configuration %s: %w", path, nameFields(data, err)))
		}
		for _, err := range c.refuseZeros() {
			errs = append(errs, fmt.Errorf("configuration %s: %w", path, err))
		}
	}
	errs = append(errs, c.loadEnv(env)...)
	errs = append(errs, c.loadFlags(flags)...)
	errs = append(errs, c.refuseZeros()...)
	return c.complete(), errors.Join(errs...)
}

// refuseZeros returns an error for each strict setting that is zero, and sets it to
// the default.
func (c *Config) refuseZeros() (errs []error) {
	for _, s := range c.settings() {
		if err := s.refuseZero(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
		}
	}
	return errs
}

// loadEnv sets the settings that env has. A nil env has none.
func (c *Config) loadEnv(env func(name string) (string, bool)) (errs []error) {
	if env == nil {
		return nil
	}
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.Flags(own)
	own.VisitAll(func(f *pflag.Flag) {
		text, ok := env(EnvName(f.Name))
		if !ok || text == "" {
			return
		}
		if err := f.Value.Set(text); err != nil {
			errs = append(errs, fmt.Errorf("environment variable %s: %w", EnvName(f.Name), formError(f.Value.Type(), text, err)))
		}
	})
	return errs
}

// loadFlags sets the settings of the changed flags. A nil set has none.
func (c *Config) loadFlags(flags *pflag.FlagSet) (errs []error) {
	if flags == nil {
		return nil
	}
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.Flags(own)
	flags.Visit(func(f *pflag.Flag) {
		target := own.Lookup(f.Name)
		if target == nil {
			return
		}
		var err error
		if list, ok := f.Value.(pflag.SliceValue); ok { // the text of a list is ambiguous
			err = target.Value.(pflag.SliceValue).Replace(list.GetSlice())
		} else {
			err = target.Value.Set(f.Value.String())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("flag --%s: %w", f.Name, err))
		}
	})
	return errs
}

// formError replaces the errors of pflag's types, which use terms of Go, by the
// expected form of the text. It returns other errors as they are.
func formError(flagType, text string, err error) error {
	switch flagType {
	case "int", "int64":
		if errors.Is(err, strconv.ErrRange) {
			return fmt.Errorf("%q is out of range", text)
		}
		return fmt.Errorf("%q is not a whole number", text)
	case "float64":
		return fmt.Errorf("%q is not a number", text)
	case "bool":
		return fmt.Errorf("%q is not true or false", text)
	}
	return err
}

// nameFields returns, for a file that was refused with err, an error that names
// each wrong field and the form that it needs. The decoder stops at the first error
// and seldom names the field, so each field is decoded alone.
func nameFields(data []byte, err error) error {
	var fields map[string]any
	var errs []error
	if yaml.Unmarshal(data, &fields) != nil {
		_ = yamlv3.Unmarshal(data, &fields) // fails where the data are no YAML
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			if v, ok := fields[name].(float64); ok && (math.IsNaN(v) || math.IsInf(v, 0)) {
				errs = append(errs, fmt.Errorf("%s: %v is not a finite number", name, v))
			}
		}
		if len(errs) == 0 {
			return err
		}
		return errors.Join(errs...)
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		part, partErr := yaml.Marshal(map[string]any{name: fields[name]})
		if partErr == nil {
			partErr = yaml.UnmarshalStrict(part, new(Config))
		}
		if partErr != nil {
			errs = append(errs, fieldError(name, partErr))
		}
	}
	if len(errs) == 0 { // such as a duplicate name
		return err
	}
	return errors.Join(errs...)
}

// unknownField matches the error of encoding/json, which has no type.
var unknownField = regexp.MustCompile(`json: unknown field ("[^"]*")`)

// fieldError returns the decoding error of one field in terms of the configuration.
func fieldError(name string, err error) error {
	if m := unknownField.FindStringSubmatch(err.Error()); m != nil {
		if m[1] == strconv.Quote(name) {
			return fmt.Errorf("there is no setting %s", m[1])
		}
		return fmt.Errorf("%s: there is no setting %s", name, m[1])
	}
	if zero, ok := errors.AsType[*zeroError](err); ok {
		for _, s := range new(Config).settings() {
			if s.name == name {
				return fmt.Errorf("%s: %w", name, s.minimumError(zero))
			}
		}
	}
	if t, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		if t.Field != "" {
			name = t.Field
		}
		return fmt.Errorf("%s: %s is expected, not %s", name, kindOf(t.Type), t.Value)
	}
	// The innermost error has the cause; the others describe the decoder's steps.
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return fmt.Errorf("%s: %w", name, err)
}

// kindOf returns the form that a field of type t needs.
func kindOf(t reflect.Type) string {
	if t == reflect.TypeFor[Duration]() {
		return "a time span such as 1m30s or 7d"
	}
	switch t.Kind() {
	case reflect.Int, reflect.Int64:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "names with values"
	default:
		return "text"
	}
}

// YAML returns the configuration as a file that [LoadConfig] reads. It holds no
// secrets, only the names of files that hold them.
func (c Config) YAML() ([]byte, error) {
	// JSON keeps the order of the fields; a map would sort them.
	data, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()                        // a float64 does not hold every whole number
	if _, err := d.Token(); err != nil { // the brace
		return nil, err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		var value any
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		part, err := yaml.Marshal(map[string]any{fmt.Sprint(name): value})
		if err != nil {
			return nil, err
		}
		out.Write(part)
	}
	return out.Bytes(), nil
}
