package chengine

import (
	"runtime"
	"unsafe"
)

// parameterArrays holds parameters in the four parallel arrays that libchdb
// expects. The memory that the arrays point to stays pinned until the pinner is
// released.
type parameterArrays struct {
	pinner                    runtime.Pinner
	names, values             []*byte
	nameLengths, valueLengths []uintptr
}

func newParameterArrays(parameters []Parameter) *parameterArrays {
	a := new(parameterArrays)
	for _, p := range parameters {
		a.names = append(a.names, a.pin(p.Name))
		a.nameLengths = append(a.nameLengths, uintptr(len(p.Name)))
		a.values = append(a.values, a.pin(p.Value))
		a.valueLengths = append(a.valueLengths, uintptr(len(p.Value)))
	}
	if len(parameters) > 0 {
		a.pinner.Pin(&a.names[0])
		a.pinner.Pin(&a.values[0])
	}
	return a
}

func (a *parameterArrays) pin(text string) *byte {
	// Because of the extra byte, an empty text has an address too.
	bytes := unsafe.SliceData(append([]byte(text), 0))
	a.pinner.Pin(bytes)
	return bytes
}
