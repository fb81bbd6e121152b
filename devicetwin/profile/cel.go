package profile

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"sync"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	maxExpression  = 1024
	celCostLimit   = 100_000 // a walk over a payload of some kilobytes; about 10 ms at the worst
	maxExpressions = 4096    // kept compiled
)

// expressions compiles each expression once, however many devices have it.
type expressions struct {
	env      func() (*cel.Env, error)
	mu       sync.Mutex
	programs map[string]cel.Program
}

func newExpressions() *expressions {
	return &expressions{
		// Made at first need: it costs some milliseconds and a megabyte.
		env: sync.OnceValues(func() (*cel.Env, error) {
			return cel.NewEnv(cel.Variable("payload", cel.DynType), cel.Variable("topic", cel.StringType))
		}),
		programs: map[string]cel.Program{},
	}
}

func (x *expressions) compile(expr string) (cel.Program, error) {
	if len(expr) > maxExpression {
		return nil, fmt.Errorf("%.40q…: longer than %d bytes", expr, maxExpression)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if p, ok := x.programs[expr]; ok {
		return p, nil
	}
	env, err := x.env()
	if err != nil {
		return nil, fmt.Errorf("CEL: %w", err)
	}
	ast, issues := env.Compile(expr)
	if issues.Err() != nil {
		return nil, fmt.Errorf("%.80q: %w", expr, issues.Err())
	}
	p, err := env.Program(ast, cel.CostLimit(celCostLimit), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, fmt.Errorf("%.80q: %w", expr, err)
	}
	if len(x.programs) >= maxExpressions {
		clear(x.programs)
	}
	x.programs[expr] = p
	return p, nil
}

var errNoKey = errors.New("the payload has no such key")

// eval runs p over a payload. errNoKey: it looked for what is not there.
func eval(p cel.Program, payload any, topic string) (ref.Val, error) {
	v, _, err := p.Eval(map[string]any{"payload": payload, "topic": topic})
	if err != nil {
		if s := err.Error(); strings.Contains(s, "no such key") || strings.Contains(s, "index out of bounds") {
			return nil, errNoKey
		}
		return nil, err
	}
	return v, nil
}

// celInput is a decoded payload with numbers that CEL can count with.
func celInput(doc any) any {
	switch v := doc.(type) {
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		return f
	case map[string]any:
		m := make(map[string]any, len(v))
		for k, e := range v {
			m[k] = celInput(e)
		}
		return m
	case []any:
		l := make([]any, len(v))
		for i, e := range v {
			l[i] = celInput(e)
		}
		return l
	}
	return doc
}

// celOutput is what an expression made, as decode takes it.
func celOutput(v ref.Val) (any, error) {
	switch v := v.(type) {
	case types.Bool:
		return bool(v), nil
	case types.Int:
		return int64(v), nil
	case types.Uint:
		return uint64(v), nil
	case types.Double:
		if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
			return nil, fmt.Errorf("%v is no number", f)
		}
		return float64(v), nil
	case types.String:
		return string(v), nil
	case types.Bytes:
		return []byte(v), nil
	case types.Null:
		return nil, nil
	}
	native, err := v.ConvertToNative(reflect.TypeFor[*structpb.Value]())
	if err != nil {
		return nil, fmt.Errorf("an expression made a %s: %w", v.Type().TypeName(), err)
	}
	value, ok := native.(*structpb.Value)
	if !ok {
		return nil, fmt.Errorf("an expression made a %s", v.Type().TypeName())
	}
	return value.AsInterface(), nil
}
